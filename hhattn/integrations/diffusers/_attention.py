"""What the swapped self-attention of a model's layers attends: everything, the pairs of a mask, what a plan says."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, cast
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor

import hhattn
from hhattn.integrations.diffusers._calls import Calls, TextsOf, text_lens
from hhattn.layout import Order, VideoLayout
from hhattn.masks import BlockMask, LayerPlan

KEPT = 8  # masks of other grids and texts are kept for the next call
# (q, k, v, valid) -> out: [B, S, H, D] each, in the model's order of tokens; valid [B, S] bool: no padding; None: all
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


class KeyLens:
    """How many tokens of each batch entry are no padding, read from the device once for all layers of a call."""

    def __init__(self) -> None:
        # which, and what was found: put there and read as one, since threads share it
        self._seen: tuple[Callable[[], Tensor | None], tuple[int, ...] | None] = (lambda: None, None)

    def of(self, valid: Tensor) -> tuple[int, ...] | None:
        """valid [B, S] -> a number for each entry; None where padding is not at the end."""
        seen, lens = self._seen
        if seen() is not valid:
            holes = (valid[:, 1:] & ~valid[:, :-1]).any(1)
            counts, found = torch.stack([valid.sum(1), holes]).tolist()
            lens = None if any(found) else tuple(counts)
            self._seen = (ref(valid), lens)
        return lens


class DenseAttention:
    """Attention to everything but padding. Padding at the end is cut off, entry by entry, so that no mask is needed."""

    def __init__(self) -> None:
        self._lens = KeyLens()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        if valid is None:
            return hhattn.attention(q, k, v)
        # compiled code would be compiled anew for each length
        lens = None if torch.compiler.is_compiling() else self._lens.of(valid)
        if lens is None or len(lens) != len(k):
            return _under_mask(q, k, v, valid)
        if min(lens) == k.shape[1]:
            return hhattn.attention(q, k, v)
        parts = zip(q.split(1), k.split(1), v.split(1), lens, strict=True)
        return torch.cat([hhattn.attention(q, k[:, :n], v[:, :n]) for q, k, v, n in parts])


def _under_mask(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None], enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


class Padding:
    """Which tokens of video and text are no padding, made once for all layers of a call, which are given one mask."""

    def __init__(self) -> None:
        # which mask, in what state, and what was made of it: put there and read as one, since threads share it
        self._seen: tuple[Callable[[], Tensor | None], tuple[int, int], Tensor | None] = (lambda: None, (0, 0), None)

    def valid(self, mask: Tensor, tokens: int) -> Tensor:
        """mask [B, ..., n], of the last n tokens -> [B, tokens] bool."""
        if torch.compiler.is_compiling() or mask.is_inference():  # nobody counts how often that is written to
            return _of_all(mask, tokens)
        seen, state, valid = self._seen
        if valid is None or seen() is not mask or state != (tokens, mask._version):
            valid = _of_all(mask, tokens)
            self._seen = (ref(mask), (tokens, mask._version), valid)
        return valid


def _of_all(mask: Tensor, tokens: int) -> Tensor:
    flat = mask.flatten(1)
    if flat.is_floating_point() or flat.shape[1] > tokens or flat.shape[1] != mask.shape[-1]:
        came = f"{mask.dtype} {tuple(mask.shape)}"
        raise ValueError(f"attention_mask is {came}; accepted is a bool or whole number for each of the last tokens")
    mask = flat.bool()
    return F.pad(mask, (tokens - mask.shape[1], 0), value=True)


class MaskedAttention:
    """Attention under a mask, and under the padding of the texts of the current call.

    ``mask`` is a BlockMask, or a function from a layout (and, where ``steps``, the sampler's step) to one: it is then
    called once for each grid that the model is given. It is had ready before the model's forward, so that compiled
    layers read nothing from the device and build nothing.
    """

    def __init__(
        self,
        mask: BlockMask | Callable[[VideoLayout], BlockMask] | Callable[[VideoLayout, int], BlockMask],
        calls: Calls,
        steps: bool = False,
    ) -> None:
        self._given, self._calls = mask, calls
        self._steps = steps and callable(mask)
        self._made: dict[tuple[Any, ...], BlockMask] = {}
        self._lock = threading.Lock()
        self._place = calls.add(self._prepare)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, step: int = 0) -> Tensor:
        mask = self.mask(q.device, step)
        return cast(Tensor, hhattn.block_sparse_attention(q, k, v, mask, order="raster" if mask.layout else None))

    def mask(self, device: torch.device, step: int = 0) -> BlockMask:
        """The mask of the current call, on ``device``."""
        if isinstance(self._given, BlockMask) and self._calls.texts_of is None and not self._calls.known:
            return self._given.to(device)  # the same in every call
        call = self._calls.now()
        ready = call.masks[self._place]
        if ready is not None and ready.device == device:
            return ready
        return self._get(call.layout, call.lens, device, step)

    def _prepare(self, layout: VideoLayout, lens: tuple[int, ...] | None, device: torch.device) -> BlockMask | None:
        return None if self._steps else self._get(layout, lens, device, 0)

    def _get(self, layout: VideoLayout, lens: tuple[int, ...] | None, device: torch.device, step: int) -> BlockMask:
        key = (layout, lens, device, step)
        with self._lock:
            if key not in self._made:
                if len(self._made) == KEPT:
                    del self._made[next(iter(self._made))]
                with torch.inference_mode(False):  # it may serve training later
                    self._made[key] = self._make(layout, lens, step).to(device)
            return self._made[key]

    def _make(self, layout: VideoLayout, lens: tuple[int, ...] | None, step: int) -> BlockMask:
        mask: Any = self._given
        if callable(mask):
            mask = mask(layout, step) if self._steps else mask(layout)
            if not isinstance(mask, BlockMask):
                raise TypeError(f"attention made a {type(mask).__name__}; accepted is a hhattn.BlockMask")
        if mask.layout is not None and not _same(mask.layout, layout):
            raise ValueError(f"attention is a mask for {mask.layout}; this call's tokens are {layout}")
        if lens is None:
            return mask
        if mask.layout is None:
            raise ValueError(
                "the texts have padding and attention is a mask without a layout; make it on a VideoLayout"
            )
        order = cast(Order, mask.order)
        return mask & hhattn.masks.dense(mask.layout, text_lens=lens, block_size=mask.block_size, order=order)


def _same(ours: VideoLayout, model: VideoLayout) -> bool:
    """The same tokens in raster order; tiles are the mask's own affair."""
    return (ours.grid, ours.text_len, ours.text_first) == (model.grid, model.text_len, model.text_first)


class NoPadding:
    """Refuses padded texts, for attention that makes masks from q and k, which padding would be part of."""

    def __init__(self, what: str) -> None:
        self.what, self._lens = what, KeyLens()

    def check(self, valid: Tensor | None) -> None:
        """ValueError if ``valid`` leaves a token out. Compiled code can't say; the hook refuses before."""
        if valid is None or torch.compiler.is_compiling():
            return
        lens = self._lens.of(valid)
        if lens is None or min(lens) < valid.shape[1]:
            self._refuse()

    def hook(self, texts_of: TextsOf) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], None]:
        """The same before a model's forward."""

        @torch._disable_dynamo
        def see(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if text_lens(texts_of(model, args, kwargs)) is not None:
                self._refuse()

        return see

    def _refuse(self) -> None:
        raise ValueError(f"attention is a {self.what}, which takes no padded texts: give texts of one length")


class PlannedAttention:
    """Attention as a plan says, which makes masks from q and k."""

    def __init__(self, plan: LayerPlan, padding: NoPadding, calls: Calls) -> None:
        self.plan, self._padding, self._calls = plan, padding, calls
        calls.add_plan(plan.plan)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        self._calls.now()  # what isn't a call would be counted as one
        self._padding.check(valid)
        return self.plan.attend(q, k, v, order="raster")


class PlannedPattern:
    """Attention under a mask that doesn't depend on q and k, or dense, as a plan says."""

    def __init__(self, plan: LayerPlan, masked: MaskedAttention, dense: Attend, calls: Calls) -> None:
        self.plan, self.masked, self.dense, self._calls = plan, masked, dense, calls
        calls.add_plan(plan.plan)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        self._calls.now()
        step, dense = self.plan.count(q, k)
        return self.dense(q, k, v, valid) if dense else self.masked(q, k, v, valid, step)
