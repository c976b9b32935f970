"""CogVideoX: joint softmax attention over text and video, q/k layer norms of each head, and adaptive layer norms."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

import hhattn
from hhattn.integrations.diffusers._blocks import Processor, argument, layer_norm, swap_attention, swap_forward
from hhattn.integrations.diffusers._choose import attention_of
from hhattn.integrations.diffusers._qk import heads, norm_rope
from hhattn.integrations.swap import Swap
from hhattn.layout import VideoLayout


class JointAttentionProcessor(Processor):
    """Does what diffusers' ``CogVideoXAttnProcessor2_0`` does. A mask is refused, not ignored."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """hidden_states [B, S, C], encoder_hidden_states [B, S_text, C], image_rotary_emb (cos, sin) [S, D] -> the same
        two."""
        if attention_mask is not None:
            raise ValueError("attention_mask must be None: CogVideoX attends under a BlockMask, or everything")
        text_len = encoder_hidden_states.shape[1]
        x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        fused = image_rotary_emb if self.fuse_rope else None
        q, k = norm_rope(attn, attn.to_q(x), attn.to_k(x), fused, self.fuse_norms, text_len, text_first=True)
        if image_rotary_emb is not None and not self.fuse_rope:
            q, k = (_rotate_video(x, image_rotary_emb, text_len) for x in (q, k))
        out = self.attend(q, k, heads(attn, attn.to_v(x)), None)
        out = attn.to_out[1](attn.to_out[0](out.flatten(2)))
        return out[:, text_len:], out[:, :text_len]


def _rotate_video(x: Tensor, rope: tuple[Tensor, Tensor], text_len: int) -> Tensor:
    tables: Any = rope
    video: Any = apply_rotary_emb(x[:, text_len:], tables, sequence_dim=1)
    return torch.cat([x[:, :text_len], video], dim=1)


def block_forward(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """A CogVideoXBlock, its norms, modulations and residual sums fused: hidden_states [B, S, C], encoder_hidden_states
    [B, S_text, C], temb [B, C_time] -> the same two."""
    text_len = encoder_hidden_states.shape[1]
    hidden_states, encoder_hidden_states = hidden_states.contiguous(), encoder_hidden_states.contiguous()
    (shift, scale, gate), text = _modulation(self.norm1, temb)
    norm = layer_norm(self.norm1.norm)
    y, text_y = self.attn1(
        hhattn.norm_modulate(hidden_states, scale, shift, **norm),
        encoder_hidden_states=hhattn.norm_modulate(encoder_hidden_states, text[1], text[0], **norm),
        image_rotary_emb=image_rotary_emb,
        **(attention_kwargs or {}),
    )
    (shift, scale, mlp_gate), text_mlp = _modulation(self.norm2, temb)
    norm = layer_norm(self.norm2.norm)
    y, hidden_states = hhattn.norm_modulate(y, scale, shift, residual=hidden_states, gate=gate, **norm)
    text_y, encoder_hidden_states = hhattn.norm_modulate(
        text_y, text_mlp[1], text_mlp[0], residual=encoder_hidden_states, gate=text[2], **norm
    )
    y = self.ff(torch.cat([text_y, y], dim=1))
    return hidden_states + mlp_gate * y[:, text_len:], encoder_hidden_states + text_mlp[2] * y[:, :text_len]


def _modulation(norm: Any, temb: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(shift, scale, gate) [B, 1, C] of the video and of the text, from a CogVideoXLayerNormZero."""
    parts = norm.linear(norm.silu(temb))[:, None].chunk(6, dim=2)
    return parts[:3], parts[3:]


def layout_of(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> VideoLayout:
    """The grid of a call: hidden_states [B, F, C, H, W] in patches, and the text before it."""
    latents, text = (
        argument(name, i, args, kwargs) for i, name in enumerate(("hidden_states", "encoder_hidden_states"))
    )
    p, p_t = model.config.patch_size, model.config.patch_size_t or 1
    grid = (-(-latents.shape[1] // p_t), latents.shape[3] // p, latents.shape[4] // p)
    return VideoLayout(*grid, text_len=text.shape[1], text_first=True)


def swap_layers(handle: Swap, prefix: str, model: Any, attention: object, norms: bool, rope: bool) -> None:
    """Swap the joint attention of every block of a CogVideoXTransformer3DModel, as :func:`hhattn.swap` says."""
    attends = attention_of(handle, model, "CogVideoX", attention, len(model.transformer_blocks), layout_of)
    for i, block in enumerate(model.transformer_blocks):
        path = f"{prefix}transformer_blocks.{i}"
        make = partial(JointAttentionProcessor, fuse_rope=rope)
        swap_attention(handle, f"{path}.attn1", block.attn1, CogVideoXAttnProcessor2_0, make, attends[i], norms, rope)
        swap_forward(handle, path, block, block_forward, norms, "CogVideoXBlock", ("norm1.norm", "norm2.norm"))
