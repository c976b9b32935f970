"""Wan: its softmax self-attention by :func:`hhattn.attention`, or by :func:`hhattn.block_sparse_attention` under a mask
or a plan of masks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor, nn

import hhattn
from hhattn.integrations.diffusers._blocks import layer_norm, swap_forward
from hhattn.integrations.diffusers._qk import heads, norm_rope, record_norms
from hhattn.integrations.swap import Swap

if TYPE_CHECKING:
    from hhattn.masks import BlockMask, LayerPlan, SparsityPlan


class SelfAttentionProcessor:
    """Does what diffusers' ``WanAttnProcessor`` does for self-attention; with ``mask`` only where the mask says."""

    def __init__(
        self, mask: BlockMask | LayerPlan | None = None, fuse_norms: bool = True, fuse_rope: bool = True
    ) -> None:
        self.mask, self.fuse_norms, self.fuse_rope = mask, fuse_norms, fuse_rope

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
            raise ValueError(
                f"{name} must be None: this processor is for Wan's self-attention; its mask is a BlockMask"
            )
        if attn.fused_projections:
            q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        q, k = norm_rope(attn, q, k, rotary_emb if self.fuse_rope else None, self.fuse_norms)
        if rotary_emb is not None and not self.fuse_rope:
            tables: Any = (rotary_emb[0][0, :, 0], rotary_emb[1][0, :, 0])
            q, k = (apply_rotary_emb(x, tables, sequence_dim=1) for x in (q, k))
        v = heads(attn, v)
        out = attn.to_out[0](self.attend(q, k, v).flatten(2))
        return attn.to_out[1](out)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, S, H, D] each, in raster order -> [B, S, H, D]."""
        if self.mask is None:
            return hhattn.attention(q, k, v)
        if isinstance(self.mask, hhattn.BlockMask):
            return cast(Tensor, hhattn.block_sparse_attention(q, k, v, self.mask, order="raster"))
        return self.mask.attend(q, k, v, order="raster")


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


def _why_not(processor: Any) -> str | None:
    if type(processor) is not WanAttnProcessor:
        return f"its processor is a {type(processor).__name__}"
    if processor._parallel_config is not None:
        return "it runs under diffusers' context parallelism"
    return None


def swap_layers(
    handle: Swap, prefix: str, model: Any, attention: str | BlockMask | SparsityPlan, norms: bool, rope: bool
) -> None:
    """Swap the self-attention of every block of a Wan transformer, as :func:`hhattn.swap` says."""
    given = None if isinstance(attention, str) else attention
    accepted = "accepted for Wan: 'exact', a hhattn.BlockMask or a hhattn.masks.SparsityPlan"
    if given is None and attention != "exact":
        raise ValueError(f"attention={attention!r}; {accepted}")
    if given is not None and not isinstance(given, (hhattn.BlockMask, hhattn.masks.SparsityPlan)):
        raise TypeError(f"attention is a {type(given).__name__}; {accepted}")
    by = "hhattn.attention" if given is None else "hhattn.block_sparse_attention"
    by += ", as the plan says" if isinstance(given, hhattn.masks.SparsityPlan) else ""
    blocks = [(f"{prefix}blocks.{i}", block) for i, block in enumerate(model.blocks)]
    blocks += [(f"{prefix}vace_blocks.{i}", block) for i, block in enumerate(getattr(model, "vace_blocks", ()))]
    for layer, (path, block) in enumerate(blocks):
        if why := _why_not(block.attn1.processor):
            handle.left(f"{path}.attn1", "self-attention", why)
        else:
            fuse = record_norms(handle, f"{path}.attn1", block.attn1, norms)
            mask = given.at(layer, prefix) if isinstance(given, hhattn.masks.SparsityPlan) else given
            handle.set_processor(f"{path}.attn1", block.attn1, SelfAttentionProcessor(mask, fuse, rope))
            handle.swapped(f"{path}.attn1", "self-attention", by)
            if rope:
                handle.swapped(f"{path}.attn1", "rope", "hhattn.qk_norm_rope")
            else:
                handle.left(f"{path}.attn1", "rope", "rope=False")
        handle.left(f"{path}.attn2", "cross-attention", "short and dense already")
        swap_forward(handle, path, block, block_forward, norms, "WanTransformerBlock", ("norm1", "norm2", "norm3"))
