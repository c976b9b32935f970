"""What swap is given and what it gives back: wrapped models, models that someone else works on, what can't be had."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers
from model_zoo import FAMILIES, Family, relative
from torch import nn

import hhattn
from hhattn import masks
from hhattn.integrations import SparseLinear
from hhattn.integrations.diffusers._sana_stream import Stream


def named(name: str) -> Family:
    return next(f for f in FAMILIES if f.name == name)


@torch.no_grad()
def test_undo_waits_for_who_came_later() -> None:
    """Layers that another wrapped since the swap are put back when that one is gone."""
    family = named("Wan")
    model = family.model()
    before = family.run(model)
    handle = hhattn.swap(model, attention=lambda layout: masks.dense(layout))
    model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.0))
    handle.undo()
    with model.cache_context("one"):
        assert relative(family.run(model), before) <= 2e-5, "what is still swapped runs"
    model.disable_cache()
    handle.undo()
    assert torch.equal(family.run(model), before)
    assert not model._forward_pre_hooks
    handle.undo()

    family = named("SANA-Video")
    model = family.model()
    before = family.run(model)
    handle = hhattn.swap(model)
    stream = Stream(model)
    handle.undo()
    stream.undo()
    handle.undo()
    assert torch.equal(family.run(model), before)


@pytest.mark.parametrize("name", ["Wan", "Mochi"])
def test_a_swapped_model_is_not_copied(name: str) -> None:
    model = named(name).model()
    with hhattn.swap(model):
        for make in (copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match=r"can't be pickled or copied: undo\(\) the swap first"):
                make(model)
    assert copy.deepcopy(model).state_dict().keys() == model.state_dict().keys()
    pickle.dumps(model)


@torch.no_grad()
def test_the_model_inside_wrappers_is_swapped() -> None:
    peft = pytest.importorskip("peft")
    family = named("Wan")
    before = family.run(family.model())
    torch.compiler.reset()
    config = peft.LoraConfig(target_modules=["to_q"])
    for wrap in (
        lambda m: torch.compile(m, backend="eager"),
        lambda m: peft.get_peft_model(m, config),
        nn.DataParallel,
    ):
        wrapped = wrap(family.model())
        assert relative(family.run(wrapped), before) <= 2e-5
        for given in (wrapped, SimpleNamespace(components={"transformer": wrapped, "vae": None})):
            with hhattn.swap(given, attention=lambda layout: masks.frame_window(layout, 0)) as handle:
                assert any(layer.swapped for layer in handle.layers)
                assert relative(family.run(wrapped), before) > 1e-3
            assert relative(family.run(wrapped), before) <= 2e-5
    with pytest.raises(ValueError, match="model_or_pipeline is a Linear, which swap doesn't know"):
        hhattn.swap(nn.Linear(2, 2))


def test_float64_is_refused() -> None:
    model = named("Wan").model(torch.float64)
    with pytest.raises(ValueError, match="the model is float64; accepted are float32"):
        hhattn.swap(model)
    copy.deepcopy(model)


def test_functions_of_other_arguments_are_refused() -> None:
    model = named("Wan").model()
    for attention, message in (
        (masks.sliding_tile, r"attention=sliding_tile can't be called with \(layout\): missing a required argument"),
        (lambda: None, "attention=<lambda> can't be called"),
        (SparseLinear(masks.sliding_tile), "critical=sliding_tile can't be called"),
        (SparseLinear(0.5, masks.sliding_tile), "marginal=sliding_tile can't be called"),
        (
            masks.SparsityPlan(lambda layout: masks.dense(layout)),
            r"select=<lambda> can't be called with \(layout, step\)",
        ),
    ):
        with pytest.raises(TypeError, match=message):
            hhattn.swap(model, attention=attention)
    assert not model._forward_pre_hooks


def test_what_diffusers_sets_on_processors() -> None:
    """A backend isn't used where layers are swapped, and the report says so; context parallelism is refused."""
    model = named("Wan").model()
    handle = hhattn.swap(model)
    assert "ignored" not in handle.report()
    model.set_attention_backend("native")
    assert "ignored    2 x attention backend" in handle.report()
    processors = [module.processor for module in model.modules() if hasattr(module, "processor")]
    assert all(hasattr(processor, "_parallel_config") for processor in processors)
    with pytest.raises(ValueError, match="a swapped model can't run under diffusers' context parallelism"):
        processors[0]._parallel_config = object()  # as enable_parallelism does
