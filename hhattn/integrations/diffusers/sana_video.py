"""SANA-Video: its linear self-attention by :func:`hhattn.block_linear_attention`, of the clip or of chunks of it."""

from __future__ import annotations

from typing import Any, cast

from diffusers.models.transformers.transformer_sana_video import SanaLinearAttnProcessor3_0
from torch import Tensor

import hhattn
from hhattn.integrations.attention import BlockLinear
from hhattn.integrations.diffusers._blocks import Processor, argument, layer_norm, swap_forward
from hhattn.integrations.diffusers._calls import Calls
from hhattn.integrations.diffusers._choose import one_each, refusal
from hhattn.integrations.diffusers._qk import heads, norm_rope, record_norms
from hhattn.integrations.swap import Swap
from hhattn.layout import VideoLayout

ACCEPTED = "'exact', a hhattn.integrations.BlockLinear, or a list with one of these for each layer"


def layout_of(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> VideoLayout:
    """The grid of a call: hidden_states [B, C, F, H, W] in patches."""
    latents = argument("hidden_states", 0, args, kwargs)
    return VideoLayout(*(n // p for n, p in zip(latents.shape[2:], model.config.patch_size, strict=True)))


class LinearAttentionProcessor(Processor):
    """Does what diffusers' ``SanaLinearAttnProcessor3_0`` does, and also takes ``rotary_emb=None``. The denominator is
    summed in float32, where that one uses the model's dtype. A mask or a second sequence is refused, not ignored. With
    ``frames``, tokens attend their own chunk of so many frames and those before."""

    def __init__(self, fuse_norms: bool, frames: int | None, calls: Calls) -> None:
        self.fuse_norms, self.frames, self.calls = fuse_norms, frames, calls

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """hidden_states [B, S, C], rotary_emb (cos, sin) [1, S, 1, D] -> [B, S, C]."""
        if encoder_hidden_states is not None or attention_mask is not None:
            name = "attention_mask" if encoder_hidden_states is None else "encoder_hidden_states"
            raise ValueError(f"{name} must be None: this is SANA-Video's self-attention, which has no mask")
        q, k = norm_rope(attn, attn.to_q(hidden_states), attn.to_k(hidden_states), None, self.fuse_norms)
        rope = None if rotary_emb is None else (rotary_emb[0][0, :, 0], rotary_emb[1][0, :, 0])
        chunk = None
        if self.frames is not None:
            grid = self.calls.now().layout
            chunk = self.frames * grid.height * grid.width
        out = hhattn.block_linear_attention(q, k, heads(attn, attn.to_v(hidden_states)), chunk_lens=chunk, rope=rope)
        out = attn.to_out[0](cast(Tensor, out).flatten(2))
        return attn.to_out[1](out)


def block_forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Any = None,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    rotary_emb: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """A SanaVideoTransformerBlock, its norms, modulations and residual sums fused: hidden_states [B, S, C], timestep
    [B, 1 or S, 6·C] -> [B, S, C]."""
    hidden_states = hidden_states.contiguous()  # the first block is given a transposed view
    table = self.scale_shift_table + timestep.reshape(hidden_states.shape[0], timestep.shape[1], 6, -1)
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = table.unbind(2)
    y = hhattn.norm_modulate(hidden_states, scale, shift, **layer_norm(self.norm1))
    hidden_states = hidden_states + gate * self.attn1(y, rotary_emb=rotary_emb)
    context = self.attn2(
        hidden_states, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask
    )
    y, hidden_states = hhattn.norm_modulate(
        context, mlp_scale, mlp_shift, residual=hidden_states, **layer_norm(self.norm2)
    )
    y = self.ff(y.unflatten(1, (frames, height, width))).flatten(1, 3)
    return hidden_states + mlp_gate * y


def chunks_of(attention: object, layers: int) -> list[int | None]:
    """What swap was given as ``attention``: frames of a chunk for each layer, None for the whole clip."""
    given = one_each(attention, layers)
    for x in given:
        if not isinstance(x, BlockLinear) and not (isinstance(x, str) and x == "exact"):
            raise refusal(x, "SANA-Video, whose attention is linear", ACCEPTED)
    return [x.frames if isinstance(x, BlockLinear) else None for x in given]


def swap_layers(handle: Swap, prefix: str, model: Any, attention: object, norms: bool, rope: bool) -> None:
    """Swap the self-attention of every block of a SanaVideoTransformer3DModel, as :func:`hhattn.swap` says."""
    chunks, calls = chunks_of(attention, len(model.transformer_blocks)), Calls(handle, model, layout_of)
    if not rope:
        raise ValueError("rope=False; accepted for SANA-Video: True, since its linear attention rotates inside the op")
    if any(chunks):
        calls.watch()
    for i, block in enumerate(model.transformer_blocks):
        path, attn, frames = f"{prefix}transformer_blocks.{i}", block.attn1, chunks[i]
        if type(attn.processor) is SanaLinearAttnProcessor3_0:
            fuse = record_norms(handle, f"{path}.attn1", attn, norms)
            handle.set_processor(f"{path}.attn1", attn, LinearAttentionProcessor(fuse, frames, calls))
            by = "hhattn.block_linear_attention" + (f", chunks of {frames} frames" if frames else "")
            handle.swapped(f"{path}.attn1", "self-attention", by)
            handle.swapped(f"{path}.attn1", "rope", "hhattn.block_linear_attention")
        else:
            handle.left(f"{path}.attn1", "self-attention", f"its processor is a {type(attn.processor).__name__}")
        if block.attn2 is not None:
            handle.left(f"{path}.attn2", "cross-attention", "short and dense already")
            swap_forward(handle, path, block, block_forward, norms, "SanaVideoTransformerBlock", ("norm1", "norm2"))
        else:
            handle.left(path, "block norms", "the block has no cross-attention")
