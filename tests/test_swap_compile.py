"""A swapped model compiled: in a process that has run none of its ops before."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("diffusers")

from helpers import randn
from model_zoo import FAMILIES

import hhattn

FIRST_CALLS = """
import torch, hhattn
from diffusers import WanTransformer3DModel
from hhattn import masks

for attention in ("exact", lambda layout: masks.frame_window(layout, 0)):
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
        ffn_dim=32, num_layers=1,
    ).eval()
    hhattn.swap(model, attention=attention)
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    with torch.no_grad():
        model(torch.ones(1, 4, 2, 4, 4), timestep=torch.ones(1), encoder_hidden_states=torch.ones(1, 7, 16))
"""


def test_the_first_calls_of_all_are_compiled() -> None:
    """Names of hhattn are loaded late, and ops registered then: not while a compiler looks on."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", FIRST_CALLS], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@torch.no_grad()
def test_dynamic_shapes_have_one_graph_for_all_grids() -> None:
    family = FAMILIES[0]
    model, inputs = family.model(), family.inputs(torch.float32)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    with hhattn.swap(model):
        model.compile_repeated_blocks(fullgraph=True, backend=backend, dynamic=True)
        for frames in (3, 4, 6):
            model(**{**inputs, "hidden_states": randn(2, 4, frames, 8, 10)})
    assert len(graphs) == 1
