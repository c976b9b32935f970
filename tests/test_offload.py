"""accelerate's hooks, which move weights in and out, on models that are swapped: before it, after it, and undone."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")

import accelerate
from accelerate.hooks import remove_hook_from_module
from helpers import randn
from model_zoo import FAMILIES, Family, relative
from torch import nn

import hhattn
from hhattn.integrations import SparseLinear

masks = hhattn.masks
by_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def offload_layers(model: nn.Module) -> None:
    """enable_sequential_cpu_offload's hooks: a layer's weights are there while it runs, else on meta."""
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def offload_model(model: nn.Module) -> None:
    """enable_model_cpu_offload's hook: the model moves as a whole."""
    accelerate.cpu_offload_with_hook(model, torch.device("cpu"))


def hooked(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if hasattr(module, "_hf_hook")]


@torch.no_grad()
@by_family
@pytest.mark.parametrize("offload", [offload_layers, offload_model])
@pytest.mark.parametrize("swap_first", [True, False])
def test_hooks_survive_swap_and_undo(family: Family, offload: object, swap_first: bool) -> None:
    model = family.model()
    before = family.run(model)
    with hhattn.swap(model) as handle:
        as_ever, expected = handle.report(), family.run(model)
    if swap_first:
        handle = hhattn.swap(model)
    offload(model)
    names = hooked(model)
    assert names
    if not swap_first:
        handle = hhattn.swap(model)
    assert handle.report() == as_ever
    assert torch.equal(family.run(model), expected)
    assert hooked(model) == names
    away = {p.device.type for p in model.parameters()}
    assert away == ({"meta"} if offload is offload_layers else {"cpu"}), "weights stay where the hooks put them"
    handle.undo()
    assert hooked(model) == names
    assert torch.equal(family.run(model), before)
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(family.run(model), before)


@torch.no_grad()
@by_family
def test_hooks_taken_away_in_between(family: Family) -> None:
    """From a swapped model, whichever came first."""
    model = family.model()
    before = family.run(model)
    with hhattn.swap(model):
        expected = family.run(model)
    for swap_first in (True, False):
        if swap_first:
            handle = hhattn.swap(model)
            offload_layers(model)
        else:
            offload_layers(model)
            handle = hhattn.swap(model)
        remove_hook_from_module(model, recurse=True)
        assert torch.equal(family.run(model), expected)
        handle.undo()
        assert torch.equal(family.run(model), before)


@torch.no_grad()
def test_patterns_and_projections_of_offloaded_layers() -> None:
    family = next(f for f in FAMILIES if f.name == "Wan")

    def near(layout: hhattn.VideoLayout) -> hhattn.BlockMask:
        return masks.frame_window(layout, 0, block_size=(16, 16))

    results = []
    for offloaded in (False, True):
        model = family.model()
        if offloaded:
            offload_layers(model)
        handle = hhattn.swap(model, attention=SparseLinear(near))
        assert {p.device.type for p in handle.parameters()} == {"cpu"}
        for i, parameter in enumerate(handle.parameters()):
            parameter.data = 0.3 * randn(*parameter.shape, seed=50 + i)
        results.append(family.run(model))
    assert torch.equal(*results)


@torch.no_grad()
def test_a_pipeline_that_offloads_its_models() -> None:
    """diffusers' own call, with the CPU as the device that models are moved to."""
    import sana_pipeline

    def run(pipeline: object) -> torch.Tensor:
        settings = {"frames": 9, "height": sana_pipeline.HEIGHT, "width": sana_pipeline.WIDTH}
        generator = torch.Generator().manual_seed(0)
        out = pipeline("a red balloon", num_inference_steps=2, generator=generator, output_type="latent", **settings)
        return out.frames

    expected = run(sana_pipeline.make())
    pipeline = sana_pipeline.make()
    pipeline.enable_model_cpu_offload(device="cpu")
    with hhattn.swap(pipeline):
        assert relative(run(pipeline), expected) <= 2e-5
    assert torch.equal(run(pipeline), expected)
    handle = hhattn.swap(pipeline)
    pipeline.remove_all_hooks()
    pipeline.enable_model_cpu_offload(device="cpu")
    assert relative(run(pipeline), expected) <= 2e-5
    handle.undo()
    assert torch.equal(run(pipeline), expected)
