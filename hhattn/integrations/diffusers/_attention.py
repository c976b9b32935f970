"""What the swapped self-attention of one model attends: everything, the pairs of a mask, or what a plan says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hhattn
from hhattn.integrations.swap import Swap
from hhattn.layout import Order, VideoLayout
from hhattn.masks import BlockMask, LayerPlan, SparsityPlan

KEPT = 8  # masks of other grids and texts are kept for the next call
# (q, k, v, valid) -> out: [B, S, H, D] each, in the model's order of tokens; valid [B, S] bool: no padding; None: all
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
# (model, positional arguments, keyword arguments of its forward) -> the grid of tokens that its blocks see
LayoutOf = Callable[[Any, tuple[Any, ...], dict[str, Any]], VideoLayout]


def attend_all(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
    """Dense attention; padding is attended by nobody."""
    if valid is None:
        return hhattn.attention(q, k, v)
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

    ``mask`` is a BlockMask, or a function from a layout to one: it is then called once for each grid that the model is
    given, which :meth:`see`, a hook before the model's forward, finds out.
    """

    def __init__(self, mask: BlockMask | Callable[[VideoLayout], BlockMask], layout_of: LayoutOf) -> None:
        self._mask, self._layout_of = mask, layout_of
        self._layout: VideoLayout | None = None
        self._made: dict[tuple[Any, ...], BlockMask] = {}
        self._seen: Callable[[], Tensor | None] = lambda: None
        self._lens: tuple[int, ...] | None = None

    def see(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the grid of the call that follows."""
        self._layout = self._layout_of(model, args, kwargs)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        mask = self.mask(q.device, valid)
        return cast(Tensor, hhattn.block_sparse_attention(q, k, v, mask, order="raster" if mask.layout else None))

    def mask(self, device: torch.device, valid: Tensor | None) -> BlockMask:
        """The mask for this call, on ``device``; made at the first call that needs it."""
        lens = None if valid is None else self._text_lens(valid)
        key = (self._layout, lens, device)
        if key not in self._made:
            if len(self._made) == KEPT:
                del self._made[next(iter(self._made))]
            with torch.inference_mode(False):  # it may serve training later
                self._made[key] = self._make(lens).to(device)
        return self._made[key]

    def _make(self, lens: tuple[int, ...] | None) -> BlockMask:
        mask = self._mask
        if callable(mask):
            if self._layout is None:
                raise RuntimeError("the model's blocks were called without the model, so the grid isn't known")
            mask = mask(self._layout)
            if not isinstance(mask, BlockMask):
                raise TypeError(f"attention made a {type(mask).__name__}; accepted is a hhattn.BlockMask")
        if mask.layout is not None and self._layout is not None and not _same(mask.layout, self._layout):
            raise ValueError(f"attention is a mask for {mask.layout}; this call's tokens are {self._layout}")
        if lens is None:
            return mask
        if mask.layout is None:
            raise ValueError(
                "the texts have padding and attention is a mask without a layout; make it on a VideoLayout"
            )
        order = cast(Order, mask.order)
        return mask & hhattn.masks.dense(mask.layout, text_lens=lens, block_size=mask.block_size, order=order)

    @torch.compiler.disable
    def _text_lens(self, valid: Tensor) -> tuple[int, ...] | None:
        """Tokens of each text that are no padding, or None where there is no padding. Read from the device once for all
        layers of a call, which are given the same tensor."""
        if self._seen() is not valid:
            layout = self._layout or (None if callable(self._mask) else self._mask.layout)
            text = 0 if layout is None else layout.text_len
            counts = (valid.sum(1) - (valid.shape[1] - text)).tolist()
            self._lens = None if all(n == text for n in counts) else tuple(counts)
            self._seen = ref(valid)
        return self._lens


def _same(ours: VideoLayout, model: VideoLayout) -> bool:
    """The same tokens in raster order; tiles are the mask's own affair."""
    return (ours.grid, ours.text_len, ours.text_first) == (model.grid, model.text_len, model.text_first)


class PlannedAttention:
    """Attention as a plan says. It makes masks from q and k, which padding would be part of, so that is refused."""

    def __init__(self, plan: LayerPlan) -> None:
        self.plan = plan
        self._seen: Callable[[], Tensor | None] = lambda: None  # the last mask found to be without padding

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        if valid is not None and valid is not self._seen():
            if not bool(valid.all()):
                raise ValueError("attention is a SparsityPlan, which takes no padded texts: give texts of one length")
            self._seen = ref(valid)
        return self.plan.attend(q, k, v, order="raster")


def attention_of(
    handle: Swap, prefix: str, model: nn.Module, family: str, given: object, layout_of: LayoutOf
) -> tuple[str, Callable[[int], Attend]]:
    """What :func:`hhattn.swap` was given as ``attention``, as words for its report and as what layer number i runs."""
    if isinstance(given, SparsityPlan):
        return "hhattn.block_sparse_attention, as the plan says", lambda i: PlannedAttention(given.at(i, prefix))
    if isinstance(given, BlockMask) or callable(given):
        masked = MaskedAttention(given, layout_of)
        handle.add_hook(model, masked.see)
        return "hhattn.block_sparse_attention", lambda _: masked
    if isinstance(given, str) and given == "exact":
        return "hhattn.attention", lambda _: attend_all
    accepted = "'exact', a hhattn.BlockMask, a function from a VideoLayout to one, or a hhattn.masks.SparsityPlan"
    if isinstance(given, str):
        raise ValueError(f"attention={given!r}; accepted for {family}: {accepted}")
    raise TypeError(f"attention is a {type(given).__name__}; accepted for {family}: {accepted}")
