"""Small transformers of every family that swap knows, with random weights, and a call of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import diffusers
import torch
from helpers import randn
from torch import Tensor, nn

import hhattn

GRID = (3, 4, 5)
TOKENS = GRID[0] * GRID[1] * GRID[2]
TEXT = 7
LATENTS = (2, 4, GRID[0], 2 * GRID[1], 2 * GRID[2])  # patches of 1x2x2
ROPE = {"rope_axes_dim": (4, 6, 6)}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}


@dataclass(frozen=True)
class Family:
    """A family: how to make a small model, the arguments of one call, and what it is like.

    text_len: text tokens that take part in self-attention; text_first: they come before the video. padded: some of them
    are padding. attention: the names of a block's self-attention layers, the video's first. linear: it is linear,
    without scores to mask. own_norms: lists of blocks that keep their own norms.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[torch.dtype], dict[str, Any]]
    blocks: tuple[str, ...] = ("transformer_blocks",)
    attention: tuple[str, ...] = ("attn1",)
    text_len: int = 0
    text_first: bool = False
    padded: bool = False
    linear: bool = False
    own_norms: tuple[str, ...] = ()

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        return randomize(self.make()).to(dtype)

    def run(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
        """What it puts out; video and audio of a model that makes both, in one."""
        out = model(**self.inputs(dtype), return_dict=False)
        return out[0] if len(out) == 1 else torch.cat([x.flatten(1) for x in out], dim=1)

    def layout(self) -> hhattn.VideoLayout:
        return hhattn.VideoLayout(*GRID, tile=(1, 2, 2), text_len=self.text_len, text_first=self.text_first)

    def attentions(self, model: nn.Module) -> list[nn.Module]:
        return [getattr(block, name) for block in self.all_blocks(model) for name in self.attention]

    def all_blocks(self, model: nn.Module) -> list[nn.Module]:
        return [block for name in self.blocks for block in getattr(model, name)]


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random, norms around 1: initial values would hide a norm's weight or a bias that is left out."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        weight_of_norm = "norm" in name and name.endswith("weight") and parameter.ndim == 1
        parameter.data = (
            1 + 0.3 * noise if weight_of_norm else noise / fan_in**0.5 * (0.3 if parameter.ndim == 1 else 1)
        )
    return model.eval()


def relative(actual: Tensor, expected: Tensor) -> float:
    """The largest error over the largest value."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def _text(dtype: torch.dtype, seed: int = 2, width: int = 16, tokens: int = TEXT) -> Tensor:
    return randn(2, tokens, width, dtype=dtype, seed=seed)


def _timestep() -> Tensor:
    return torch.tensor([3.0, 700.0])


def _padding(tokens: int = TEXT, second: int = 4) -> Tensor:
    """A whole text and one of ``second`` tokens."""
    return (torch.arange(tokens) < torch.tensor([[tokens], [second]])).long()


WAN: dict[str, Any] = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
    "text_dim": 16, "freq_dim": 32, "ffn_dim": 32, "num_layers": 2, "cross_attn_norm": True, "rope_max_seq_len": 32,
}  # fmt: skip


def _wan(**settings: Any) -> nn.Module:
    return diffusers.WanTransformer3DModel(**WAN, **settings)


def _vace() -> nn.Module:
    return diffusers.WanVACETransformer3DModel(**WAN, vace_layers=[0, 1], vace_in_channels=6)


def _sana() -> nn.Module:
    return diffusers.SanaVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=16,
        mlp_ratio=2.0, patch_size=(1, 2, 2), rope_max_seq_len=32,
    )  # fmt: skip


def _hunyuan(**settings: Any) -> nn.Module:
    return diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, num_refiner_layers=1, text_embed_dim=16,
        pooled_projection_dim=8, **HEADS, **ROPE, **settings,
    )  # fmt: skip


def _hunyuan15() -> nn.Module:
    return diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=4, out_channels=4, num_layers=2, num_refiner_layers=1, text_embed_dim=16, text_embed_2_dim=12,
        image_embed_dim=10, patch_size=2, **HEADS, **ROPE,
    )  # fmt: skip


def _cogvideox() -> nn.Module:
    return diffusers.CogVideoXTransformer3DModel(
        in_channels=4, out_channels=4, num_layers=2, text_embed_dim=16, time_embed_dim=8, max_text_seq_length=TEXT,
        sample_width=10, sample_height=8, sample_frames=9, use_rotary_positional_embeddings=True, **HEADS,
    )  # fmt: skip


def _ltx() -> nn.Module:
    return diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, cross_attention_dim=32, num_layers=2, caption_channels=16, **HEADS
    )


def _ltx2(**settings: Any) -> nn.Module:
    return diffusers.LTX2VideoTransformer3DModel(
        in_channels=8, out_channels=8, cross_attention_dim=32, audio_in_channels=6, audio_out_channels=6,
        audio_num_attention_heads=2, audio_attention_head_dim=12, audio_cross_attention_dim=24, num_layers=2,
        caption_channels=16, **HEADS, **settings,
    )  # fmt: skip


def _mochi() -> nn.Module:
    return diffusers.MochiTransformer3DModel(
        in_channels=4, num_layers=2, pooled_projection_dim=16, text_embed_dim=16, time_embed_dim=8, **HEADS
    )


def _video(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": randn(*LATENTS, dtype=dtype, seed=1),
        "encoder_hidden_states": _text(dtype),
        "timestep": _timestep(),
    }


def _image(dtype: torch.dtype) -> dict[str, Any]:
    return {**_video(dtype), "encoder_hidden_states_image": _text(dtype, 6, 8, 5)}


def _control(dtype: torch.dtype) -> dict[str, Any]:
    control = randn(LATENTS[0], 6, *LATENTS[2:], dtype=dtype, seed=7)
    return {**_video(dtype), "control_hidden_states": control}


def _hunyuan_inputs(dtype: torch.dtype) -> dict[str, Any]:
    pooled, guidance = randn(2, 8, dtype=dtype, seed=3), torch.tensor([6000.0, 1000.0])
    return {**_video(dtype), "encoder_attention_mask": _padding(), "pooled_projections": pooled, "guidance": guidance}


def _hunyuan15_inputs(dtype: torch.dtype) -> dict[str, Any]:
    return {
        **_video(dtype),
        "timestep": _timestep().to(dtype),  # its embedding is computed in this dtype
        "encoder_attention_mask": _padding(),
        "encoder_hidden_states_2": _text(dtype, 4, 12, 3),
        "encoder_attention_mask_2": _padding(3, 1),
        "image_embeds": _text(dtype, 5, 10, 2),
    }


def _cogvideox_inputs(dtype: torch.dtype) -> dict[str, Any]:
    latents = randn(2, GRID[0], 4, 2 * GRID[1], 2 * GRID[2], dtype=dtype, seed=1)
    rope = hhattn.rope_3d(GRID, 16)
    return {**_video(dtype), "hidden_states": latents, "image_rotary_emb": rope}


def _ltx_inputs(dtype: torch.dtype) -> dict[str, Any]:
    names = ("num_frames", "height", "width")
    return {
        "hidden_states": randn(2, TOKENS, 8, dtype=dtype, seed=1),
        "encoder_hidden_states": _text(dtype),
        "timestep": _timestep(),
        "encoder_attention_mask": _padding(),
        **dict(zip(names, GRID, strict=True)),
        "rope_interpolation_scale": (0.3, 32.0, 32.0),
    }


AUDIO = 9


def _ltx2_inputs(dtype: torch.dtype) -> dict[str, Any]:
    inputs = _ltx_inputs(dtype)
    del inputs["rope_interpolation_scale"]
    return {
        **inputs,
        "audio_hidden_states": randn(2, AUDIO, 6, dtype=dtype, seed=3),
        "audio_encoder_hidden_states": _text(dtype, 4),
        "audio_encoder_attention_mask": _padding(),
        "audio_num_frames": AUDIO,
    }


def _ltx23_inputs(dtype: torch.dtype) -> dict[str, Any]:
    """A noise level a token, texts already projected, the second clip's second block guided by its values."""
    return {
        **_ltx2_inputs(dtype),
        "encoder_hidden_states": _text(dtype, width=32),
        "audio_encoder_hidden_states": _text(dtype, 4, 24),
        "timestep": 1000 * randn(2, TOKENS, seed=5).sigmoid(),
        "audio_timestep": _timestep(),
        "sigma": _timestep(),
        "use_cross_timestep": True,
        "spatio_temporal_guidance_blocks": [1],
        "perturbation_mask": torch.tensor([1.0, 0.0], dtype=dtype),
    }


def _mochi_inputs(dtype: torch.dtype) -> dict[str, Any]:
    return {**_video(dtype), "encoder_attention_mask": _padding()}


_ltx23 = partial(
    _ltx2, rope_type="split", gated_attn=True, audio_gated_attn=True, cross_attn_mod=True, audio_cross_attn_mod=True,
    perturbed_attn=True, use_prompt_embeddings=False,
)  # fmt: skip
HUNYUAN_BLOCKS = ("transformer_blocks", "single_transformer_blocks")
FAMILIES = [
    Family("Wan", _wan, _video, ("blocks",)),
    Family("Wan I2V", partial(_wan, image_dim=8, added_kv_proj_dim=24), _image, ("blocks",)),
    Family("Wan VACE", _vace, _control, ("blocks", "vace_blocks"), own_norms=("vace_blocks",)),
    Family("SANA-Video", _sana, _video, linear=True),
    Family(
        "HunyuanVideo", _hunyuan, _hunyuan_inputs, HUNYUAN_BLOCKS, ("attn",), TEXT, padded=True
    ),
    Family(
        "HunyuanVideo I2V", partial(_hunyuan, image_condition_type="token_replace"), _hunyuan_inputs, HUNYUAN_BLOCKS,
        ("attn",), TEXT, padded=True, own_norms=HUNYUAN_BLOCKS,
    ),
    Family("HunyuanVideo 1.5", _hunyuan15, _hunyuan15_inputs, attention=("attn",), text_len=TEXT + 5, padded=True),
    Family("CogVideoX", _cogvideox, _cogvideox_inputs, text_len=TEXT, text_first=True),
    Family("LTX-Video", _ltx, _ltx_inputs),
    Family("LTX-2", _ltx2, _ltx2_inputs, attention=("attn1", "audio_attn1")),
    Family("LTX-2.3", _ltx23, _ltx23_inputs, attention=("attn1", "audio_attn1")),
    Family("Mochi", _mochi, _mochi_inputs, text_len=TEXT, padded=True),
]  # fmt: skip
