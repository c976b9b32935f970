"""What the CUDA kernels ask of memory, counted by the emulator: on aligned shapes no global access touches more sectors
than its bytes need, and none of shared memory takes more passes over the banks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import randn

import hhattn.ops.norm_modulate  # noqa: F401, defines the operators
from hhattn import simt

pytestmark = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="the emulator is built with g++")
BF16 = torch.bfloat16


def norm_modulate() -> None:
    x, row = randn(2, 8, 1536, seed=1).to(BF16), randn(2, 2, 1536, seed=2).to(BF16)
    torch.ops.hhattn_cuda.norm_modulate(x, row, row.clone(), None, None, x.clone(), row.clone(), True, 1e-6)


CASES: dict[str, tuple[int, Callable[[], None]]] = {"norm_modulate": (80, norm_modulate)}

#: Lines outside of main loops that may cost more, by their text, and how many times their minimum.
KNOWN: dict[str, float] = {}


@pytest.mark.parametrize("name", CASES)
def test_accesses_cost_what_their_bytes_need(name: str) -> None:
    arch, call = CASES[name]
    with simt.emulate(arch, seed=1, counters=True) as session:
        call()
        counters = session.counters
        assert not session.reports, "\n".join(map(str, session.reports))
    assert any(c.space == "global" and c.write for c in counters)
    worse = []
    for c in counters:
        line = Path(c.file).read_text().splitlines()[c.line - 1].strip()
        if c.cost > c.minimum * KNOWN.get(line, 1.0):
            where = f"{Path(c.file).name}:{c.line}: {line}"
            worse.append(f"{where}: {c.space}, {c.bytes} bytes a lane: {c.cost} where {c.minimum} are enough")
    assert not worse, "\n".join(worse)
    widest = sum(c.lanes * c.bytes for c in counters if c.space == "global" and c.bytes == 16)
    assert widest > 0.8 * sum(c.lanes * c.bytes for c in counters if c.space == "global"), "most bytes move by sixteens"
