"""Wan 2.1 and 2.2: its softmax self-attention, its q/k norms over all heads, and its layer norms."""

from __future__ import annotations

from functools import partial
from typing import Any

from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor, nn

import hhattn
from hhattn.integrations.diffusers._blocks import (
    Processor,
    argument,
    layer_norm,
    refuse_cross_attention,
    swap_attention,
    swap_forward,
)
from hhattn.integrations.diffusers._choose import attention_of
from hhattn.integrations.diffusers._qk import heads, norm_rope
from hhattn.integrations.swap import Swap
from hhattn.layout import VideoLayout


class SelfAttentionProcessor(Processor):
    """Does what diffusers' ``WanAttnProcessor`` does for self-attention."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """hidden_states [B, S, C], rotary_emb (cos, sin) [1, S, 1, D] -> [B, S, C]."""
        refuse_cross_attention("Wan", encoder_hidden_states, attention_mask)
        if attn.fused_projections:
            q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        q, k = norm_rope(attn, q, k, rotary_emb if self.fuse_rope else None, self.fuse_norms)
        if rotary_emb is not None and not self.fuse_rope:
            tables: Any = (rotary_emb[0][0, :, 0], rotary_emb[1][0, :, 0])
            q, k = (apply_rotary_emb(x, tables, sequence_dim=1) for x in (q, k))
        v = heads(attn, v)
        out = attn.to_out[0](self.attend(q, k, v, None).flatten(2))
        return attn.to_out[1](out)


def block_forward(
    self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: tuple[Tensor, Tensor]
) -> Tensor:
    """A WanTransformerBlock, its norms, modulations and residual sums fused: hidden_states [B, S, C], temb [B, 6, C]
    or (one a token) [B, S, 6, C] -> [B, S, C]."""
    hidden_states = hidden_states.contiguous()  # the first block is given a transposed view
    table = self.scale_shift_table[:, None] + (temb if temb.ndim == 4 else temb[:, None]).float()
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = table.unbind(2)
    y = hhattn.norm_modulate(hidden_states, scale, shift, **layer_norm(self.norm1))
    y = self.attn1(y, None, None, rotary_emb)
    if isinstance(self.norm2, nn.Identity):
        y = hidden_states = (hidden_states.float() + gate * y).type_as(hidden_states)
    else:
        y, hidden_states = hhattn.norm_modulate(y, residual=hidden_states, gate=gate, **layer_norm(self.norm2))
    y = self.attn2(y, encoder_hidden_states, None, None)
    y, hidden_states = hhattn.norm_modulate(y, ffn_scale, ffn_shift, residual=hidden_states, **layer_norm(self.norm3))
    return (hidden_states.float() + ffn_gate * self.ffn(y)).type_as(hidden_states)


def layout_of(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> VideoLayout:
    """The grid of a call: hidden_states [B, C, F, H, W] in patches."""
    latents = argument("hidden_states", 0, args, kwargs)
    t, h, w = (n // p for n, p in zip(latents.shape[2:], model.config.patch_size, strict=True))
    return VideoLayout(t, h, w)


def swap_layers(handle: Swap, prefix: str, model: Any, attention: object, norms: bool, rope: bool) -> None:
    """Swap the self-attention of every block of a Wan transformer, as :func:`hhattn.swap` says."""
    blocks = [(f"{prefix}blocks.{i}", block) for i, block in enumerate(model.blocks)]
    blocks += [(f"{prefix}vace_blocks.{i}", block) for i, block in enumerate(getattr(model, "vace_blocks", ()))]
    attends = attention_of(handle, model, "Wan", attention, len(blocks), layout_of)
    for i, (path, block) in enumerate(blocks):
        make = partial(SelfAttentionProcessor, fuse_rope=rope)
        swap_attention(handle, f"{path}.attn1", block.attn1, WanAttnProcessor, make, attends[i], norms, rope)
        handle.left(f"{path}.attn2", "cross-attention", "short and dense already")
        swap_forward(handle, path, block, block_forward, norms, "WanTransformerBlock", ("norm1", "norm2", "norm3"))
