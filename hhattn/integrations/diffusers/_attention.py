"""What the swapped self-attention of a model's layers attends: everything, the pairs of a mask, what a plan says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hhattn
from hhattn.layout import Order, VideoLayout
from hhattn.masks import BlockMask, LayerPlan

KEPT = 8  # masks of other grids and texts are kept for the next call
# (q, k, v, valid) -> out: [B, S, H, D] each, in the model's order of tokens; valid [B, S] bool: no padding; None: all
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
# (model, positional arguments, keyword arguments of its forward) -> the grid of tokens that its blocks see
LayoutOf = Callable[[Any, tuple[Any, ...], dict[str, Any]], VideoLayout]
# the same -> masks [B, n] of the texts that self-attention takes, not 0 where a token is no padding
TextsOf = Callable[[Any, tuple[Any, ...], dict[str, Any]], list[Tensor]]


class KeyLens:
    """How many tokens of each batch entry are no padding, read from the device once for all layers of a call."""

    def __init__(self) -> None:
        self._seen: Callable[[], Tensor | None] = lambda: None
        self._lens: tuple[int, ...] | None = None

    def of(self, valid: Tensor) -> tuple[int, ...] | None:
        """valid [B, S] -> a number for each entry; None where padding is not at the end."""
        if self._seen() is not valid:
            holes = (valid[:, 1:] & ~valid[:, :-1]).any(1)
            lens, found = torch.stack([valid.sum(1), holes]).tolist()
            self._lens, self._seen = None if any(found) else tuple(lens), ref(valid)
        return self._lens


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
        self._seen: tuple[Callable[[], Tensor | None], int, int] = (lambda: None, 0, 0)
        self._valid: Tensor | None = None

    def valid(self, mask: Tensor, tokens: int, at_the_end: bool = False) -> Tensor:
        """mask [B, ..., n], of the last n tokens -> [B, tokens] bool. ``at_the_end``: ValueError unless padding is."""
        if torch.compiler.is_compiling():
            return _of_all(mask, tokens)
        seen, *state = self._seen
        if self._valid is None or seen() is not mask or state != [tokens, version(mask)]:
            valid = _of_all(mask, tokens)
            if at_the_end and bool((valid[:, 1:] & ~valid[:, :-1]).any()):
                raise ValueError(
                    "encoder_attention_mask has padding before other tokens; accepted is padding at the end"
                )
            self._valid, self._seen = valid, (ref(mask), tokens, version(mask))
        return self._valid


def version(x: Tensor) -> int:
    """How often x was written to; inference tensors don't count."""
    return 0 if x.is_inference() else x._version


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
    called once for each grid that the model is given. :meth:`see`, a hook before the model's forward, finds out grid
    and padding and has the mask ready, so that compiled layers read nothing from the device and build nothing.
    """

    def __init__(
        self,
        mask: BlockMask | Callable[[VideoLayout], BlockMask] | Callable[[VideoLayout, int], BlockMask],
        layout_of: LayoutOf,
        texts_of: TextsOf | None = None,
        steps: bool = False,
    ) -> None:
        self._given, self._layout_of, self._texts_of = mask, layout_of, texts_of
        self._steps = steps and callable(mask)
        self._layout: VideoLayout | None = None
        self._lens: tuple[int, ...] | None = None
        self._made: dict[tuple[Any, ...], BlockMask] = {}
        self._ready = None if callable(mask) else mask

    @torch._disable_dynamo  # it reads the device and builds masks
    def see(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the grid and the texts of the call that follows, and have its mask ready."""
        self._layout = self._layout_of(model, args, kwargs)
        if self._texts_of is not None:
            self._lens = _text_lens(self._texts_of(model, args, kwargs))
        if not self._steps:
            # not the weights' device, which may be offloaded
            latents: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            self._ready = self._get(latents.device, 0)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, step: int = 0) -> Tensor:
        mask = self.mask(q.device, step)
        return cast(Tensor, hhattn.block_sparse_attention(q, k, v, mask, order="raster" if mask.layout else None))

    def mask(self, device: torch.device, step: int = 0) -> BlockMask:
        """The mask of the current call, on ``device``."""
        if self._ready is not None and self._ready.device == device:
            return self._ready
        ready = self._get(device, step)
        if not self._steps:
            self._ready = ready
        return ready

    def _get(self, device: torch.device, step: int) -> BlockMask:
        key = (self._layout, self._lens, device, step)
        if key not in self._made:
            if len(self._made) == KEPT:
                del self._made[next(iter(self._made))]
            with torch.inference_mode(False):  # it may serve training later
                self._made[key] = self._make(step).to(device)
        return self._made[key]

    def _make(self, step: int) -> BlockMask:
        mask: Any = self._given
        if callable(mask):
            if self._layout is None:
                raise RuntimeError("the model's blocks were called without the model, so the grid isn't known")
            mask = mask(self._layout, step) if self._steps else mask(self._layout)
            if not isinstance(mask, BlockMask):
                raise TypeError(f"attention made a {type(mask).__name__}; accepted is a hhattn.BlockMask")
        if mask.layout is not None and self._layout is not None and not _same(mask.layout, self._layout):
            raise ValueError(f"attention is a mask for {mask.layout}; this call's tokens are {self._layout}")
        if self._lens is None:
            return mask
        if mask.layout is None:
            raise ValueError(
                "the texts have padding and attention is a mask without a layout; make it on a VideoLayout"
            )
        order = cast(Order, mask.order)
        return mask & hhattn.masks.dense(mask.layout, text_lens=self._lens, block_size=mask.block_size, order=order)


def _text_lens(texts: list[Tensor]) -> tuple[int, ...] | None:
    """Tokens that are no padding, in all texts [B, n] together; None where no text has any. Read from the device."""
    counts = sum(text.bool().sum(1) for text in texts)
    whole = sum(text.shape[1] for text in texts)
    lens = tuple(counts.tolist())  # type: ignore[union-attr]
    return None if all(n == whole for n in lens) else lens


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
            if _text_lens(texts_of(model, args, kwargs)) is not None:
                self._refuse()

        return see

    def _refuse(self) -> None:
        raise ValueError(f"attention is a {self.what}, which takes no padded texts: give texts of one length")


class PlannedAttention:
    """Attention as a plan says, which makes masks from q and k."""

    def __init__(self, plan: LayerPlan, padding: NoPadding) -> None:
        self.plan, self._padding = plan, padding

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        self._padding.check(valid)
        return self.plan.attend(q, k, v, order="raster")


class PlannedPattern:
    """Attention under a mask that doesn't depend on q and k, or dense, as a plan says."""

    def __init__(self, plan: LayerPlan, masked: MaskedAttention, dense: Attend) -> None:
        self.plan, self.masked, self.dense = plan, masked, dense

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        step, dense = self.plan.count(q, k)
        return self.dense(q, k, v, valid) if dense else self.masked(q, k, v, valid, step)
