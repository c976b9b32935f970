"""What layers must know of the model's call that they run in: its grid, its texts' lengths, the masks made for both."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hhattn.integrations.swap import Swap
from hhattn.layout import VideoLayout
from hhattn.masks import BlockMask, SparsityPlan

# (model, positional arguments, keyword arguments of its forward) -> the grid of tokens that its blocks see
LayoutOf = Callable[[Any, tuple[Any, ...], dict[str, Any]], VideoLayout]
# the same -> masks [B, n] of the texts that self-attention takes, not 0 where a token is no padding
TextsOf = Callable[[Any, tuple[Any, ...], dict[str, Any]], list[Tensor]]
# what a call's masks are made of -> a mask, had ready before the layers run; None: it is made step by step
Prepare = Callable[[VideoLayout, tuple[int, ...] | None, torch.device], BlockMask | None]


@dataclass(frozen=True)
class Call:
    """One call: its grid, the tokens of each clip's texts that are no padding (None: all), a mask for each pattern."""

    layout: VideoLayout
    lens: tuple[int, ...] | None
    masks: tuple[BlockMask | None, ...]


class _Here(threading.local):
    """The call under way in this thread. Set in ``__init__``, because Dynamo doesn't guard a default of the class."""

    def __init__(self) -> None:
        self.call: Call | None = None


class Calls:
    """The calls of one swapped model, each seen by the layers that run inside it and by no others: not in other
    threads, not after it. Blocks that gradient checkpointing runs again, in the backward, run under their own call.

    Hooks before and after the model's forward begin and end one, once there is something to :meth:`watch` for.
    """

    def __init__(self, handle: Swap, model: nn.Module, layout_of: LayoutOf, texts_of: TextsOf | None = None) -> None:
        self._handle, self._layout_of, self.texts_of = handle, layout_of, texts_of
        self._model: Any = model
        self._here = _Here()
        self._prepare: list[Prepare] = []
        self._plans: list[SparsityPlan] = []
        self._running: int | None = None  # the thread of a call that a plan counts
        self._noise: float | None = None
        self._rises: bool | None = None  # Mochi's noise levels rise, others fall
        self._hooked = self.undone = False

    def add(self, prepare: Prepare) -> int:
        """The place in :attr:`Call.masks` of what ``prepare`` makes at the beginning of every call."""
        self.watch()
        self._prepare.append(prepare)
        return len(self._prepare) - 1

    def add_plan(self, plan: SparsityPlan) -> None:
        """Let ``plan`` count from 0 at every new video: its states under the name of this object are forgotten."""
        self.watch()
        if not any(plan is other for other in self._plans):
            self._plans.append(plan)
            self._handle.on_undo(lambda: plan.forget(self))

    def now(self) -> Call:
        """The call under way here. RuntimeError where there is none."""
        call = self._here.call
        if call is None:
            raise RuntimeError(
                "the model's blocks were called without the model, so the grid isn't known; to compute them again in "
                "the backward, use model.enable_gradient_checkpointing()"
            )
        return call

    @property
    def known(self) -> bool:
        """Whether a call is under way here."""
        return self._here.call is not None

    @contextmanager
    def during(self, call: Call | None) -> Iterator[None]:
        """Layers run under ``call``, once more."""
        if self.undone:
            raise RuntimeError("the swap was undone between a forward with gradient checkpointing and its backward")
        before, self._here.call = self._here.call, call
        try:
            yield
        finally:
            self._here.call = before

    def watch(self) -> None:
        """Begin to see calls."""
        if self._hooked:
            return
        self._hooked = True
        self._handle.add_hook(self._model, self._begin, self._end)
        self._handle.on_undo(self._undo)

    @torch._disable_dynamo  # it reads the device and builds masks
    def _begin(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._here.call = None
        if self._plans:
            self._count(model, args, kwargs)
        # not the weights' device, which may be offloaded
        latents: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        layout = self._layout_of(model, args, kwargs)
        lens = None if self.texts_of is None else text_lens(self.texts_of(model, args, kwargs))
        masks = tuple(prepare(layout, lens, latents.device) for prepare in self._prepare)
        self._here.call = Call(layout, lens, masks)
        checkpoint = model.__dict__.get("_gradient_checkpointing_func")
        if checkpoint is not None and not (isinstance(checkpoint, Checkpoint) and checkpoint.calls is self):
            model._gradient_checkpointing_func = Checkpoint(self, checkpoint)

    @torch._disable_dynamo
    def _end(self, *_: Any) -> None:
        self._here.call = None
        if self._running == threading.get_ident():
            self._running = None

    def _count(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse calls that a plan would miscount; begin anew where the noise, which had gone one way, goes back."""
        if self._running not in (None, threading.get_ident()):
            raise RuntimeError(
                "attention is a SparsityPlan, which counts calls: only one thread at a time can run the model"
            )
        self._running = threading.get_ident()
        if torch.is_grad_enabled():
            if getattr(model, "is_gradient_checkpointing", False):
                raise ValueError(
                    "attention is a SparsityPlan, which counts calls, and gradient checkpointing calls layers twice: "
                    "disable_gradient_checkpointing(), or train under a mask"
                )
            return  # training draws noise levels in no order
        before, self._noise = self._noise, _noise(model, args, kwargs)
        if before is None or self._noise is None or self._noise == before:
            return
        rises = self._noise > before
        if self._rises is None:
            self._rises = rises
        elif self._rises != rises:
            for plan in self._plans:
                plan.forget(self)

    def _undo(self) -> None:
        self.undone = True
        checkpoint = self._model.__dict__.get("_gradient_checkpointing_func")
        if isinstance(checkpoint, Checkpoint) and checkpoint.calls is self:
            self._model._gradient_checkpointing_func = checkpoint.inner


class Checkpoint:
    """A model's function for gradient checkpointing, ``inner``, with blocks that know which call they belong to."""

    def __init__(self, calls: Calls, inner: Callable[..., Any]) -> None:
        self.calls, self.inner = calls, inner

    def __call__(self, module: Callable[..., Any], *args: Any) -> Any:
        """``inner`` of the module and its arguments."""
        if torch.compiler.is_compiling():  # the compiled backward has the masks that it was traced with
            return self.inner(module, *args)
        calls = self.calls
        call = calls.now()

        def run(*args: Any) -> Any:
            with calls.during(call):
                return module(*args)

        return self.inner(run, *args)


def text_lens(texts: list[Tensor]) -> tuple[int, ...] | None:
    """Tokens that are no padding, in all texts [B, n] together; None where no text has any. Read from the device."""
    counts = sum(text.bool().sum(1) for text in texts)
    whole = sum(text.shape[1] for text in texts)
    lens = tuple(counts.tolist())  # type: ignore[union-attr]
    return None if all(n == whole for n in lens) else lens


def _noise(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
    """The highest noise level of a call, as the model counts them; tokens of a given picture have none."""
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    given = kwargs.get("timestep", dict(zip(names, args, strict=False)).get("timestep"))
    return float(given.max()) if isinstance(given, Tensor) else given
