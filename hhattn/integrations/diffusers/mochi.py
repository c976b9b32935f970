"""Mochi: joint softmax attention over video and text, q/k norms of each head with learned angles, and RMS norms."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from diffusers.models.attention_processor import MochiAttnProcessor2_0
from torch import Tensor

import hhattn
from hhattn.integrations.diffusers._attention import Attend, Padding
from hhattn.integrations.diffusers._blocks import Processor, argument, swap_attention, swap_forward
from hhattn.integrations.diffusers._choose import attention_of
from hhattn.integrations.diffusers._qk import heads, norm_added, norm_rope
from hhattn.integrations.swap import Swap
from hhattn.layout import VideoLayout

NORMS = ("norm1", "norm2", "norm3", "norm4")
KINDS = ("MochiRMSNormZero", "MochiModulatedRMSNorm")


class JointAttentionProcessor(Processor):
    """Does what diffusers' ``MochiAttnProcessor2_0`` does: what comes out at a text's tokens is moved forward, over
    those that its mask leaves out, and 0 after them."""

    def __init__(self, attend: Attend, fuse_norms: bool, padding: Padding, fuse_rope: bool = True) -> None:
        super().__init__(attend, fuse_norms, fuse_rope)
        self.padding = padding

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """hidden_states [B, S, C], encoder_hidden_states [B, S_text, C_text], attention_mask [B, S_text],
        image_rotary_emb (cos, sin) [S, H, D/2] -> the same two."""
        q, k = attn.to_q(hidden_states), attn.to_k(hidden_states)
        if image_rotary_emb is None or not self.fuse_rope:
            q, k = norm_rope(attn, q, k, None, self.fuse_norms)
            q, k = (q, k) if image_rotary_emb is None else (rotated(x, *image_rotary_emb) for x in (q, k))
        else:
            cos, sin = (table.repeat_interleave(2, -1)[None] for table in image_rotary_emb)
            q, k = norm_rope(attn, q, k, (cos, sin), self.fuse_norms)
        text_q, text_k = attn.add_q_proj(encoder_hidden_states), attn.add_k_proj(encoder_hidden_states)
        text_q, text_k = norm_added(attn, text_q, text_k, self.fuse_norms)
        v, text_v = heads(attn, attn.to_v(hidden_states)), heads(attn, attn.add_v_proj(encoder_hidden_states))
        q, k, v = (torch.cat(pair, dim=1) for pair in ((q, text_q), (k, text_k), (v, text_v)))
        valid = self.padding.valid(attention_mask, q.shape[1])
        out = self.attend(q, k, v, valid).flatten(2)
        video, text = out.split_with_sizes((hidden_states.shape[1], text_q.shape[1]), dim=1)
        valid = valid[:, hidden_states.shape[1] :, None]
        text = torch.take_along_dim(text * valid, (~valid).byte().argsort(dim=1, stable=True), dim=1)
        video = attn.to_out[1](attn.to_out[0](video))
        return video, attn.to_add_out(text) if hasattr(attn, "to_add_out") else text


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, S, H, D], neighbours turned by the angles [S, H, D/2], as diffusers' processor does it."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x)


class _Stream:
    """The video's or the text's way through a block: x [B, S, C] around the joint attention."""

    def __init__(self, x: Tensor, temb: Tensor, norms: list[Any], ff: Any) -> None:
        self.x, self.norms, self.ff = x, norms, ff
        self.modulation = norms[0].linear(norms[0].silu(temb))[:, None].chunk(4, dim=2)

    def before(self) -> Tensor:
        """What attention is given."""
        y = hhattn.norm_modulate(self.x, self.modulation[0], norm="rms", eps=self.norms[0].norm.eps)
        return cast(Tensor, y)

    def after(self, attended: Tensor) -> Tensor:
        """x after the block."""
        _, gate, mlp_scale, mlp_gate = self.modulation
        y, x = hhattn.norm_modulate(
            self._gated(attended, gate, self.norms[1]), mlp_scale, residual=self.x, norm="rms", eps=self.norms[2].eps
        )
        return x + self._gated(self.ff(y), mlp_gate, self.norms[3])

    def _gated(self, y: Tensor, gate: Tensor, norm: Any) -> Tensor:
        """The norm of y times tanh(gate), where norm_modulate multiplies by 1 + scale."""
        return cast(Tensor, hhattn.norm_modulate(y, gate.float().tanh() - 1, norm="rms", eps=norm.eps))


def block_forward(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    encoder_attention_mask: Tensor,
    image_rotary_emb: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A MochiTransformerBlock, its norms, modulations and residual sums fused: hidden_states [B, S, C],
    encoder_hidden_states [B, S_text, C_text], temb [B, C] -> the same two."""
    video = _Stream(hidden_states, temb, [self.get_submodule(name) for name in NORMS], self.ff)
    text = None
    if not self.context_pre_only:
        norms = [self.get_submodule(f"{name}_context") for name in NORMS]
        text = _Stream(encoder_hidden_states, temb, norms, self.ff_context)
    attended, text_attended = self.attn1(
        video.before(),
        encoder_hidden_states=self.norm1_context(encoder_hidden_states, temb) if text is None else text.before(),
        image_rotary_emb=image_rotary_emb,
        attention_mask=encoder_attention_mask,
    )
    return video.after(attended), encoder_hidden_states if text is None else text.after(text_attended)


def layout_of(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> VideoLayout:
    """The grid of a call: hidden_states [B, C, F, H, W] in patches, and the text after it."""
    latents, text = (
        argument(name, i, args, kwargs) for i, name in enumerate(("hidden_states", "encoder_hidden_states"))
    )
    p = model.config.patch_size
    return VideoLayout(latents.shape[2], latents.shape[3] // p, latents.shape[4] // p, text_len=text.shape[1])


def texts_of(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The mask [B, S_text] of a call's text. ValueError where its padding is not at the end, as patterns know it."""
    mask = argument("encoder_attention_mask", 3, args, kwargs)
    if bool((mask[:, 1:].bool() & ~mask[:, :-1].bool()).any()):
        raise ValueError("encoder_attention_mask has padding before other tokens; accepted is padding at the end")
    return [mask]


def swap_layers(handle: Swap, prefix: str, model: Any, attention: object, norms: bool, rope: bool) -> None:
    """Swap the joint attention of every block of a MochiTransformer3DModel, as :func:`hhattn.swap` says."""
    layers = len(model.transformer_blocks)
    attends = attention_of(handle, model, "Mochi", attention, layers, layout_of, texts_of)
    padding = Padding()
    for i, block in enumerate(model.transformer_blocks):
        path = f"{prefix}transformer_blocks.{i}"
        make = partial(JointAttentionProcessor, padding=padding, fuse_rope=rope)
        swap_attention(handle, f"{path}.attn1", block.attn1, MochiAttnProcessor2_0, make, attends[i], norms, rope)
        swap_forward(handle, path, block, block_forward, norms, "MochiTransformerBlock", NORMS, KINDS)
