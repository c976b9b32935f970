"""Each call of a swapped model has its own grid, texts and masks: when blocks run again in the backward, in threads,
from one video to the next."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from helpers import randn
from model_zoo import FAMILIES, Family, relative
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hhattn
from hhattn import VideoLayout, masks
from hhattn.integrations import BlockLinear

BLOCKS = {"block_size": (16, 16)}


def named(name: str) -> Family:
    return next(f for f in FAMILIES if f.name == name)


def near(layout: VideoLayout) -> hhattn.BlockMask:
    return masks.frame_window(layout, 0, **BLOCKS) | masks.text(layout, **BLOCKS)


def two_calls(family: Family) -> list[dict[str, Any]]:
    """Arguments of two calls: another grid, and texts of other lengths where those have padding."""
    first = family.inputs(torch.float32)
    second = {**first, "hidden_states": randn(*first["hidden_states"].shape[:2], 5, 8, 6, seed=9)}
    if family.padded:
        second = {**first, "encoder_attention_mask": (torch.arange(7) < torch.tensor([[3], [2]])).long()}
    return [first, second]


def call(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return model(**inputs, return_dict=False)[0]


# ---- gradient checkpointing ----


@pytest.mark.parametrize("name", ["Wan", "HunyuanVideo", "SANA-Video"])
@pytest.mark.parametrize("own", [False, True])
def test_checkpointed_blocks_run_again_under_their_own_call(name: str, own: bool) -> None:
    """Two forwards before one backward, by diffusers' checkpointing function and by the user's."""
    family = named(name)
    gradients = []
    for checkpointed in (False, True):
        model = family.model().train()
        if checkpointed:
            function = (lambda block, *args: checkpoint(block, *args, use_reentrant=False)) if own else None
            model.enable_gradient_checkpointing(function)
        with hhattn.swap(model, attention=BlockLinear(1) if family.linear else near):
            sum(call(model, inputs).square().sum() for inputs in two_calls(family)).backward()
        if checkpointed:
            assert type(model._gradient_checkpointing_func).__name__ == "function", "it isn't given back"
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert relative(gradients[1], gradients[0]) < 1e-5


def test_what_checkpointing_cannot_run_again_is_refused() -> None:
    family = named("Wan")
    model = family.model().train()
    model.enable_gradient_checkpointing()
    with hhattn.swap(model, attention=near):
        loss = family.run(model).square().sum()
    with pytest.raises(RuntimeError, match="the swap was undone between a forward with gradient checkpointing"):
        loss.backward()
    for plan in (
        masks.SparsityPlan(lambda layout, step: near(layout)),
        masks.Selector(masks.mean_pool(), masks.top_k(1)),
    ):
        with hhattn.swap(model, attention=plan):
            with pytest.raises(ValueError, match="gradient checkpointing calls layers twice"):
                family.run(model)
            with torch.no_grad():
                family.run(model)


def test_blocks_that_run_outside_of_a_call_are_refused() -> None:
    """As a wrapper of blocks that diffusers doesn't know would run them, in the backward."""
    family = named("Wan")
    model = family.model()
    block, own = model.blocks[0], type(model.blocks[0]).forward
    for attention in (near, masks.SparsityPlan(masks.Selector(masks.mean_pool(), masks.top_k(ratio=0.5)))):
        with hhattn.swap(model, attention=attention, norms=False):
            block.forward = lambda *args: checkpoint(own, block, *args, use_reentrant=False)
            loss = family.run(model).square().sum()
            with pytest.raises(RuntimeError, match="blocks were called without the model"):
                loss.backward()
            del block.forward


# ---- threads ----


@torch.no_grad()
def test_threads_have_calls_of_their_own() -> None:
    """In two threads, whose texts have other lengths, each result is that of its own call."""
    family = named("HunyuanVideo")
    model, inputs = family.model(), two_calls(family)
    wrong: list[Any] = []

    def work(i: int, expected: Tensor) -> None:
        try:
            with torch.no_grad():
                wrong.extend(i for _ in range(12) if relative(call(model, inputs[i]), expected) > 1e-4)
        except Exception as error:
            wrong.append(error)

    for attention in (near, "exact"):
        with hhattn.swap(model, attention=attention):
            expected = [call(model, x) for x in inputs]
            threads = [threading.Thread(target=work, args=(i, expected[i])) for i in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert not wrong


@torch.no_grad()
def test_a_plan_is_of_one_thread_at_a_time() -> None:
    family = named("Wan")
    model = family.model()
    errors: list[str] = []

    def other() -> None:
        try:
            family.run(model)
        except RuntimeError as error:
            errors.append(str(error))

    def meanwhile(*_: Any) -> None:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    with hhattn.swap(model, attention=masks.SparsityPlan(lambda layout, step: near(layout))):
        hook = model.blocks[0].register_forward_hook(meanwhile)
        family.run(model)
        hook.remove()
        assert len(errors) == 1
        assert "only one thread at a time" in errors[0]
        other()
        assert len(errors) == 1


# ---- one video after another ----


@torch.no_grad()
@pytest.mark.parametrize("name", ["Wan", "Mochi"])
def test_a_plan_begins_anew_with_a_video(name: str) -> None:
    """Where noise, having fallen (Mochi's counts rise), begins again, and at a swap with the same plan."""
    family = named(name)
    model = family.model()
    levels = [300.0, 600.0, 900.0] if name == "Mochi" else [900.0, 600.0, 300.0]

    def pattern(layout: VideoLayout, step: int) -> hhattn.BlockMask:
        steps.append(step)
        return near(layout)

    plan, steps = masks.SparsityPlan(pattern, dense_steps=1), []

    def video() -> list[Tensor]:
        inputs = family.inputs(torch.float32)
        return [call(model, {**inputs, "timestep": torch.tensor([level] * 2)}) for level in levels]

    dense = video()
    for _ in range(2):
        with hhattn.swap(model, attention=plan):
            for _ in range(2):
                got = video()
                assert relative(got[0], dense[0]) <= 2e-5
                assert all(relative(a, b) > 1e-3 for a, b in zip(got[1:], dense[1:], strict=True))
        assert not plan._states, "undone, it remembers"
    assert set(steps) == {1, 2}


# ---- texts ----


@torch.no_grad()
def test_mochi_takes_padding_before_the_text() -> None:
    """As diffusers does, dense, eager and compiled; a pattern, which would need to know where, is refused in both."""
    family = named("Mochi")
    model, inputs = family.model(), family.inputs(torch.float32)
    inputs["encoder_attention_mask"] = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1, 0]])
    expected = call(model, inputs)
    torch.compiler.reset()
    for attention in ("exact", near):
        with hhattn.swap(model, attention=attention):
            for compiled in (False, True):
                if compiled:
                    for block in model.transformer_blocks:
                        block.compile(fullgraph=True, backend="eager")
                if attention == "exact":
                    assert relative(call(model, inputs), expected) <= 2e-5
                else:
                    with pytest.raises(ValueError, match="padding before other tokens; accepted is padding at the end"):
                        call(model, inputs)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["HunyuanVideo", "Mochi"])
def test_a_mask_of_texts_is_written_to(name: str) -> None:
    """In inference mode too, where tensors don't count it."""
    family = named(name)
    model, inputs = family.model(), family.inputs(torch.float32)
    inputs["encoder_attention_mask"] = lengths = torch.ones(2, 7, dtype=torch.long)
    for attention in ("exact", near):
        lengths.fill_(1)
        with hhattn.swap(model, attention=attention):
            call(model, inputs)
            lengths[:, 4:] = 0
            got = call(model, inputs)
        with hhattn.swap(model, attention=attention):
            assert relative(got, call(model, {**inputs, "encoder_attention_mask": lengths.clone()})) <= 2e-5
