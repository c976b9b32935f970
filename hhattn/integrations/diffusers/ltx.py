"""LTX-Video: its softmax self-attention, its q/k norms over all heads with angles of each head, and its RMS norms."""

from __future__ import annotations

from functools import partial
from typing import Any

from diffusers.models.transformers.transformer_ltx import LTXVideoAttnProcessor, apply_rotary_emb
from torch import Tensor

import hhattn
from hhattn.integrations.diffusers._blocks import (
    RMS_NORMS,
    Processor,
    argument,
    refuse_cross_attention,
    rms_norm,
    swap_attention,
    swap_forward,
)
from hhattn.integrations.diffusers._choose import attention_of
from hhattn.integrations.diffusers._qk import heads, norm_rope
from hhattn.integrations.swap import Swap
from hhattn.layout import VideoLayout


class SelfAttentionProcessor(Processor):
    """Does what diffusers' ``LTXVideoAttnProcessor`` does for self-attention."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """hidden_states [B, S, C], image_rotary_emb (cos, sin) [B, S, H·D] -> [B, S, C]."""
        refuse_cross_attention("LTX-Video", encoder_hidden_states, attention_mask)
        q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), heads(attn, attn.to_v(hidden_states))
        if image_rotary_emb is not None and not self.fuse_rope:  # diffusers rotates between the norm and the heads
            q, k = (apply_rotary_emb(norm(x), image_rotary_emb) for norm, x in ((attn.norm_q, q), (attn.norm_k, k)))
            q, k = heads(attn, q), heads(attn, k)
        else:
            rope = None
            if image_rotary_emb is not None:
                cos, sin = (heads(attn, table) for table in image_rotary_emb)
                rope = (cos, sin)
            q, k = norm_rope(attn, q, k, rope, self.fuse_norms)
        out = attn.to_out[0](self.attend(q, k, v, None).flatten(2))
        return attn.to_out[1](out)


def block_forward(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    encoder_attention_mask: Tensor | None = None,
) -> Tensor:
    """An LTXVideoTransformerBlock, its norms, modulations and residual sums fused: hidden_states [B, S, C], temb
    [B, 1 or S, 6·C] -> [B, S, C]."""
    table = self.scale_shift_table + temb.unflatten(2, (6, -1))
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = table.unbind(2)
    y = hhattn.norm_modulate(hidden_states, scale, shift, **rms_norm(self.norm1))
    hidden_states = hidden_states + gate * self.attn1(y, image_rotary_emb=image_rotary_emb)
    y = self.attn2(hidden_states, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask)
    y, hidden_states = hhattn.norm_modulate(y, mlp_scale, mlp_shift, residual=hidden_states, **rms_norm(self.norm2))
    return hidden_states + mlp_gate * self.ff(y)


def layout_of(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> VideoLayout:
    """The grid of a call, which LTX-Video is told; without it, only positions are known."""
    names = ("num_frames", "height", "width")
    grid = [argument(name, i, args, kwargs) for i, name in enumerate(names, start=4)]
    if None in grid:
        raise ValueError(
            "attention is made for a grid, so LTX-Video's forward must be given num_frames, height and width"
        )
    return VideoLayout(*grid)


def swap_layers(handle: Swap, prefix: str, model: Any, attention: object, norms: bool, rope: bool) -> None:
    """Swap the self-attention of every block of an LTXVideoTransformer3DModel, as :func:`hhattn.swap` says."""
    attends = attention_of(handle, model, "LTX-Video", attention, len(model.transformer_blocks), layout_of)
    for i, block in enumerate(model.transformer_blocks):
        path = f"{prefix}transformer_blocks.{i}"
        make = partial(SelfAttentionProcessor, fuse_rope=rope)
        swap_attention(handle, f"{path}.attn1", block.attn1, LTXVideoAttnProcessor, make, attends[i], norms, rope)
        handle.left(f"{path}.attn2", "cross-attention", "short and dense already")
        swap_forward(
            handle, path, block, block_forward, norms, "LTXVideoTransformerBlock", ("norm1", "norm2"), RMS_NORMS
        )
