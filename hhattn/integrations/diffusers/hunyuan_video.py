"""HunyuanVideo and HunyuanVideo 1.5: joint softmax attention over video and padded text, q/k norms of each head, and
layer norms of blocks with two streams and with one."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15AttnProcessor2_0
from torch import Tensor

import hhattn
from hhattn.integrations.diffusers._attention import Attend, Padding
from hhattn.integrations.diffusers._blocks import Processor, argument, layer_norm, swap_attention, swap_forward
from hhattn.integrations.diffusers._choose import attention_of
from hhattn.integrations.diffusers._qk import heads, norm_added, norm_rope
from hhattn.integrations.swap import Swap
from hhattn.layout import VideoLayout

TWO_STREAMS = ("norm1.norm", "norm1_context.norm", "norm2", "norm2_context")


class JointAttentionProcessor(Processor):
    """Does what diffusers' processors of HunyuanVideo and 1.5 do, without a mask of every pair of tokens. What comes
    out at padding is not always the same, and nobody attends it."""

    def __init__(self, attend: Attend, fuse_norms: bool, padding: Padding, fuse_rope: bool = True) -> None:
        super().__init__(attend, fuse_norms, fuse_rope)
        self.padding = padding

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """hidden_states [B, S, C], encoder_hidden_states [B, S_text, C], attention_mask [B, 1, 1, S + S_text] or
        [B, S_text], image_rotary_emb (cos, sin) [S, D] -> the same two."""
        video_len = hidden_states.shape[1]
        if attn.add_q_proj is None:
            x = torch.cat([hidden_states, encoder_hidden_states], dim=1)
            q, k = self._video_qk(attn, x, image_rotary_emb, encoder_hidden_states.shape[1])
            v = heads(attn, attn.to_v(x))
        else:
            q, k = self._video_qk(attn, hidden_states, image_rotary_emb, 0)
            text_q, text_k = attn.add_q_proj(encoder_hidden_states), attn.add_k_proj(encoder_hidden_states)
            text = (
                *norm_added(attn, text_q, text_k, self.fuse_norms),
                heads(attn, attn.add_v_proj(encoder_hidden_states)),
            )
            video = (q, k, heads(attn, attn.to_v(hidden_states)))
            q, k, v = (torch.cat(pair, dim=1) for pair in zip(video, text, strict=True))
        valid = None if attention_mask is None else self.padding.valid(attention_mask, q.shape[1])
        out = self.attend(q, k, v, valid).flatten(2)
        hidden_states, encoder_hidden_states = out[:, :video_len], out[:, video_len:]
        if getattr(attn, "to_out", None) is not None:
            hidden_states = attn.to_out[1](attn.to_out[0](hidden_states))
        if getattr(attn, "to_add_out", None) is not None:
            encoder_hidden_states = attn.to_add_out(encoder_hidden_states)
        return hidden_states, encoder_hidden_states

    def _video_qk(
        self, attn: Any, x: Tensor, rope: tuple[Tensor, Tensor] | None, text_len: int
    ) -> tuple[Tensor, Tensor]:
        """q and k of x, of whose tokens the last ``text_len`` aren't rotated."""
        q, k = norm_rope(attn, attn.to_q(x), attn.to_k(x), rope if self.fuse_rope else None, self.fuse_norms, text_len)
        if rope is None or self.fuse_rope:
            return q, k
        return _rotate_video(q, rope, text_len), _rotate_video(k, rope, text_len)


def _rotate_video(x: Tensor, rope: tuple[Tensor, Tensor], text_len: int) -> Tensor:
    tables: Any = rope
    video_len = x.shape[1] - text_len
    video: Any = apply_rotary_emb(x[:, :video_len], tables, sequence_dim=1)
    return torch.cat([video, x[:, video_len:]], dim=1)


class _Stream:
    """The video's or the text's way through a block: x [B, S, C] around the joint attention."""

    def __init__(self, x: Tensor, temb: Tensor, norm1: Any, norm2: Any, ff: Any) -> None:
        self.x, self.norm1, self.norm2, self.ff = x.contiguous(), norm1, norm2, ff
        self.modulation = norm1.linear(norm1.silu(temb))[:, None].chunk(6, dim=2)

    def before(self) -> Tensor:
        """What attention is given."""
        shift, scale = self.modulation[:2]
        return cast(Tensor, hhattn.norm_modulate(self.x, scale, shift, **layer_norm(self.norm1.norm)))

    def after(self, attended: Tensor) -> Tensor:
        """x after the block."""
        gate, shift, scale, mlp_gate = self.modulation[2:]
        y, x = hhattn.norm_modulate(attended, scale, shift, residual=self.x, gate=gate, **layer_norm(self.norm2))
        return x + mlp_gate * self.ff(y)


def block_forward(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    freqs_cis: tuple[Tensor, Tensor] | None = None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """A block of two streams, its norms, modulations and residual sums fused: hidden_states [B, S, C],
    encoder_hidden_states [B, S_text, C], temb [B, C] -> the same two."""
    video = _Stream(hidden_states, temb, self.norm1, self.norm2, self.ff)
    text = _Stream(encoder_hidden_states, temb, self.norm1_context, self.norm2_context, self.ff_context)
    attended = self.attn(video.before(), text.before(), attention_mask=attention_mask, image_rotary_emb=freqs_cis)
    return video.after(attended[0]), text.after(attended[1])


def single_forward(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """A block of one stream, in which attention and MLP stand side by side, its norm and modulation fused."""
    x, video_len = torch.cat([hidden_states, encoder_hidden_states], dim=1), hidden_states.shape[1]
    shift, scale, gate = self.norm.linear(self.norm.silu(temb))[:, None].chunk(3, dim=2)
    y = cast(Tensor, hhattn.norm_modulate(x, scale, shift, **layer_norm(self.norm.norm)))
    attended = self.attn(
        y[:, :video_len], y[:, video_len:], attention_mask=attention_mask, image_rotary_emb=image_rotary_emb
    )
    y = torch.cat([torch.cat(attended, dim=1), self.act_mlp(self.proj_mlp(y))], dim=2)
    x = x + gate * self.proj_out(y)
    return x[:, :video_len], x[:, video_len:]


def layout_of(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> VideoLayout:
    """The grid of a call: hidden_states [B, C, F, H, W] in patches, and after it the texts, in 1.5 those of two
    encoders and the image's tokens."""
    latents, text = argument("hidden_states", 0, args, kwargs), argument("encoder_hidden_states", 2, args, kwargs)
    texts = [text]
    if _is_later(model):
        texts += [argument("encoder_hidden_states_2", 5, args, kwargs), argument("image_embeds", 7, args, kwargs)]
    p, p_t = model.config.patch_size, model.config.patch_size_t
    grid = (latents.shape[2] // p_t, latents.shape[3] // p, latents.shape[4] // p)
    return VideoLayout(*grid, text_len=sum(text.shape[1] for text in texts))


def texts_of(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The masks of a call's texts. In 1.5 an image of zeros stands for none, and all its tokens are padding."""
    texts = [argument("encoder_attention_mask", 3, args, kwargs)]
    if _is_later(model):
        image = argument("image_embeds", 7, args, kwargs)
        shown = (image != 0).any().expand(image.shape[:2])
        texts += [argument("encoder_attention_mask_2", 6, args, kwargs), shown]
    return texts


def _is_later(model: Any) -> bool:
    return type(model).__name__ == "HunyuanVideo15Transformer3DModel"


def swap_layers(handle: Swap, prefix: str, model: Any, attention: object, norms: bool, rope: bool) -> None:
    """Swap the joint attention of every block of a HunyuanVideo transformer, as :func:`hhattn.swap` says."""
    padding = Padding()
    blocks = [(f"{prefix}transformer_blocks.{i}", block) for i, block in enumerate(model.transformer_blocks)]
    single = getattr(model, "single_transformer_blocks", ())
    blocks += [(f"{prefix}single_transformer_blocks.{i}", block) for i, block in enumerate(single)]
    later = _is_later(model)
    name = "HunyuanVideo15" if later else "HunyuanVideo"
    processor = HunyuanVideo15AttnProcessor2_0 if later else HunyuanVideoAttnProcessor2_0
    attends = attention_of(handle, model, "HunyuanVideo", attention, len(blocks), layout_of, texts_of)
    for i, (path, block) in enumerate(blocks):
        make = partial(JointAttentionProcessor, padding=padding, fuse_rope=rope)
        swap_attention(handle, f"{path}.attn", block.attn, processor, make, attends[i], norms, rope)
        if "single" in path:
            swap_forward(handle, path, block, single_forward, norms, f"{name}SingleTransformerBlock", ("norm.norm",))
        else:
            swap_forward(handle, path, block, block_forward, norms, f"{name}TransformerBlock", TWO_STREAMS)
