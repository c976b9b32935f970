"""LTX-2 and 2.3: the softmax self-attention of its video and of its audio, q/k norms over all heads with angles of each
head, neighbours or halves turned, and the RMS norms of blocks in which the two streams and the text meet."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from diffusers.models.transformers.transformer_ltx2 import (
    LTX2AudioVideoAttnProcessor,
    LTX2PerturbedAttnProcessor,
    apply_interleaved_rotary_emb,
    apply_split_rotary_emb,
)
from torch import Tensor

import hhattn
from hhattn.integrations.diffusers._attention import DenseAttention
from hhattn.integrations.diffusers._blocks import (
    RMS_NORMS,
    Processor,
    argument,
    refuse_cross_attention,
    rms_norm,
    swap_attention,
    swap_forward,
)
from hhattn.integrations.diffusers._choose import attention_of, everything
from hhattn.integrations.diffusers._qk import heads, norm_rope
from hhattn.integrations.swap import Swap
from hhattn.layout import VideoLayout

STREAM_NORMS = ("norm1", "norm2", "norm3")
NORMS = (*STREAM_NORMS, *(f"audio_{n}" for n in STREAM_NORMS), "audio_to_video_norm", "video_to_audio_norm")


class SelfAttentionProcessor(Processor):
    """Does what diffusers' ``LTX2AudioVideoAttnProcessor`` and ``LTX2PerturbedAttnProcessor`` do for self-attention."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        query_rotary_emb: tuple[Tensor, Tensor] | None = None,
        key_rotary_emb: tuple[Tensor, Tensor] | None = None,
        perturbation_mask: Tensor | None = None,
        all_perturbed: bool | Tensor | None = None,
    ) -> Tensor:
        """hidden_states [B, S, C], query_rotary_emb (cos, sin) [B, S, H·D], or [B, H, S, D/2] of halves,
        perturbation_mask [B, 1, 1]: 0 where the values stand for what is attended -> [B, S, C]."""
        refuse_cross_attention("LTX-2", encoder_hidden_states, attention_mask)
        if key_rotary_emb is not None:
            raise ValueError("key_rotary_emb must be None: q and k of self-attention have the same positions")
        v = heads(attn, attn.to_v(hidden_states))
        if perturbation_mask is not None and (all_perturbed is None or torch.compiler.is_compiling()):
            all_perturbed = False  # a value to be read would break the graph; the mask gives the same
        if all_perturbed:
            out = v
        else:
            out = self.attend(*self._queries_and_keys(attn, hidden_states, query_rotary_emb), v, None)
            if perturbation_mask is not None:
                out = torch.lerp(v, out, perturbation_mask[..., None])
        if attn.to_gate_logits is not None:
            out = out * (2 * attn.to_gate_logits(hidden_states).sigmoid())[..., None]
        return attn.to_out[1](attn.to_out[0](out.flatten(2)))

    def _queries_and_keys(self, attn: Any, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """[B, S, H, D], normed and turned."""
        q, k, halves = attn.to_q(x), attn.to_k(x), attn.rope_type == "split"
        if rope is None or self.fuse_rope:
            rotate = "half" if halves else "interleaved"
            return norm_rope(attn, q, k, rope and tables(attn, rope, halves), self.fuse_norms, rotate=rotate)
        turn = apply_split_rotary_emb if halves else apply_interleaved_rotary_emb
        q, k = turn(attn.norm_q(q), rope), turn(attn.norm_k(k), rope)  # diffusers turns before it splits the heads
        return heads(attn, q), heads(attn, k)


def tables(attn: Any, rope: tuple[Tensor, Tensor], halves: bool) -> tuple[Tensor, Tensor]:
    """diffusers' cos and sin as [B, S, H, D], every frequency standing twice."""
    if halves:
        cos, sin = (torch.cat([table, table], dim=3).transpose(1, 2) for table in rope)
    else:
        cos, sin = (heads(attn, table) for table in rope)
    return cos, sin


def modulation(table: Tensor, temb: Tensor) -> tuple[Tensor, ...]:
    """table [n, C], temb [B, 1 or S, n·C] -> n tensors [B, 1 or S, C]."""
    return (table + temb.unflatten(2, (len(table), -1))).unbind(2)


class _Stream:
    """The video's or the audio's way through a block. What a layer gave (``_branch``) is added to x by the next norm,
    in the same pass."""

    def __init__(self, block: Any, prefix: str, x: Tensor, temb: Tensor) -> None:
        self.block, self.prefix, self.x = block, prefix, x
        self.modulation = modulation(self.part("scale_shift_table"), temb)
        self._branch: tuple[Tensor, Tensor | None] | None = None

    def part(self, name: str) -> Any:
        """This stream's own layer or table of that name."""
        return getattr(self.block, self.prefix + name)

    def add(self, branch: Tensor, gate: Tensor | None = None) -> None:
        """x + gate · branch, when x is next asked for."""
        self._branch = (branch, gate)

    def normed(self, norm: Any, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """norm(x) · (1 + scale) + shift."""
        if self._branch is None:
            return cast(Tensor, hhattn.norm_modulate(self.x, scale, shift, **rms_norm(norm)))
        (branch, gate), self._branch = self._branch, None
        y, self.x = hhattn.norm_modulate(branch, scale, shift, residual=self.x, gate=gate, **rms_norm(norm))
        return y

    def attend_itself(self, rope: Any, mask: Tensor | None, perturbed: dict[str, Any]) -> None:
        """Self-attention; ``perturbed`` are the arguments of blocks that can leave it out."""
        shift, scale, gate = self.modulation[:3]
        y = self.normed(self.part("norm1"), scale, shift)
        self.add(self.part("attn1")(y, attention_mask=mask, query_rotary_emb=rope, **perturbed), gate)

    def attend_text(self, text: Tensor, mask: Tensor | None, temb: Tensor | None) -> None:
        """Cross-attention to the text, modulated on both sides in LTX-2.3."""
        shift, scale, gate = self.modulation[6:] or (None, None, None)
        y = self.normed(self.part("norm2"), scale, shift)
        if self.block.cross_attn_adaln:
            table = self.part("prompt_scale_shift_table")
            text_shift, text_scale = table.to(y.dtype) if temb is None else modulation(table, temb)
            text = text * (1 + text_scale) + text_shift
        self.add(self.part("attn2")(y, encoder_hidden_states=text, attention_mask=mask), gate)

    def meet(self, norm: Any, table: Tensor, temb: Tensor) -> tuple[Tensor, Tensor]:
        """x as it takes part in attention from video to audio's keys, and from audio to video's."""
        scale, shift, back_scale, back_shift = modulation(table[:4], temb)
        return self.normed(norm, scale, shift), self.normed(norm, back_scale, back_shift)

    def feed_forward(self) -> Tensor:
        """x after the block."""
        shift, scale, gate = self.modulation[3:6]
        y = self.part("ff")(self.normed(self.part("norm3"), scale, shift))
        return self.x + gate * y


def block_forward(
    self: Any,
    hidden_states: Tensor,
    audio_hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    audio_encoder_hidden_states: Tensor,
    temb: Tensor,
    temb_audio: Tensor,
    temb_ca_scale_shift: Tensor,
    temb_ca_audio_scale_shift: Tensor,
    temb_ca_gate: Tensor,
    temb_ca_audio_gate: Tensor,
    temb_prompt: Tensor | None = None,
    temb_prompt_audio: Tensor | None = None,
    video_rotary_emb: tuple[Tensor, Tensor] | None = None,
    audio_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ca_video_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ca_audio_rotary_emb: tuple[Tensor, Tensor] | None = None,
    encoder_attention_mask: Tensor | None = None,
    audio_encoder_attention_mask: Tensor | None = None,
    self_attention_mask: Tensor | None = None,
    audio_self_attention_mask: Tensor | None = None,
    a2v_cross_attention_mask: Tensor | None = None,
    v2a_cross_attention_mask: Tensor | None = None,
    use_a2v_cross_attention: bool = True,
    use_v2a_cross_attention: bool = True,
    perturbation_mask: Tensor | None = None,
    all_perturbed: bool | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """An LTX2VideoTransformerBlock, its norms, modulations and residual sums fused: hidden_states [B, S, C],
    audio_hidden_states [B, S_audio, C_audio] -> the same two."""
    video = _Stream(self, "", hidden_states, temb)
    audio = _Stream(self, "audio_", audio_hidden_states, temb_audio)
    perturbed: dict[str, Any] = {"perturbation_mask": perturbation_mask, "all_perturbed": all_perturbed}
    perturbed = perturbed if self.perturbed_attn else {}
    video.attend_itself(video_rotary_emb, self_attention_mask, perturbed)
    audio.attend_itself(audio_rotary_emb, audio_self_attention_mask, perturbed)
    video.attend_text(encoder_hidden_states, encoder_attention_mask, temb_prompt)
    audio.attend_text(audio_encoder_hidden_states, audio_encoder_attention_mask, temb_prompt_audio)
    if use_a2v_cross_attention or use_v2a_cross_attention:
        table, audio_table = self.video_a2v_cross_attn_scale_shift_table, self.audio_a2v_cross_attn_scale_shift_table
        x, back_x = video.meet(self.audio_to_video_norm, table, temb_ca_scale_shift)
        y, back_y = audio.meet(self.video_to_audio_norm, audio_table, temb_ca_audio_scale_shift)
        if use_a2v_cross_attention:
            x = self.audio_to_video_attn(
                x, y, a2v_cross_attention_mask, query_rotary_emb=ca_video_rotary_emb, key_rotary_emb=ca_audio_rotary_emb
            )
            video.add(x, *modulation(table[4:], temb_ca_gate))
        if use_v2a_cross_attention:
            back_y = self.video_to_audio_attn(
                back_y,
                back_x,
                v2a_cross_attention_mask,
                query_rotary_emb=ca_audio_rotary_emb,
                key_rotary_emb=ca_video_rotary_emb,
            )
            audio.add(back_y, *modulation(audio_table[4:], temb_ca_audio_gate))
    return video.feed_forward(), audio.feed_forward()


def layout_of(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> VideoLayout:
    """The grid of a call's video, which LTX-2 is told in latent frames, rows and columns."""
    names = ("num_frames", "height", "width")
    grid = [argument(name, i, args, kwargs) for i, name in enumerate(names, start=10)]
    if None in grid:
        raise ValueError("attention is made for a grid, so LTX-2's forward must be given num_frames, height and width")
    p, p_t = model.config.patch_size, model.config.patch_size_t
    return VideoLayout(*(-(-n // size) for n, size in zip(grid, (p_t, p, p), strict=True)))


def swap_layers(handle: Swap, prefix: str, model: Any, attention: object, norms: bool, rope: bool) -> None:
    """Swap the self-attention of every block of an LTX2VideoTransformer3DModel, as :func:`hhattn.swap` says: that of
    the video runs ``attention``, that of the audio, which is short, everything."""
    attends = attention_of(handle, model, "LTX-2", attention, len(model.transformer_blocks), layout_of)
    audio = everything(DenseAttention())
    for i, block in enumerate(model.transformer_blocks):
        path = f"{prefix}transformer_blocks.{i}"
        kind = LTX2PerturbedAttnProcessor if getattr(block, "perturbed_attn", False) else LTX2AudioVideoAttnProcessor
        make = partial(SelfAttentionProcessor, fuse_rope=rope)
        for name, what, part in (
            ("attn1", attends[i], "self-attention"),
            ("audio_attn1", audio, "audio self-attention"),
        ):
            swap_attention(handle, f"{path}.{name}", getattr(block, name), kind, make, what, norms, rope, part)
        for name in ("attn2", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn"):
            handle.left(f"{path}.{name}", "cross-attention", "short and dense already")
        swap_forward(handle, path, block, block_forward, norms, "LTX2VideoTransformerBlock", NORMS, RMS_NORMS)
