"""A block of Wan 1.3B and of SANA-Video 2B at full width: diffusers' own, swapped, and swapped to sparse attention."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import SanaVideoTransformer3DModel, WanTransformer3DModel
from harness import Case, options, report
from torch import Tensor, nn

import hhattn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from helpers import randn
from model_zoo import randomize, relative

masks = hhattn.masks
TILE = (4, 8, 8)


def pattern(layout: hhattn.VideoLayout) -> hhattn.BlockMask:
    """A quarter of the pairs, in blocks of a quarter of a tile's tokens: all full or empty."""
    tiled = hhattn.VideoLayout(*layout.grid, tile=TILE)
    return masks.sliding_tile(tiled, (2, 2, 2), block_size=(64, 64), order="tile")


def sdpa(*qkv: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv)).transpose(1, 2)


class Swapped:
    """A model with a swap of its own: what stands in its instance is put there for a call and taken away again."""

    def __init__(self, model: nn.Module, call: Callable[[nn.Module], Tensor], **settings: Any) -> None:
        self.model, self.call, self.settings = model, call, settings

    def __call__(self) -> Tensor:
        with hhattn.swap(self.model, **self.settings):
            return self.call(self.model)


def wan(args: argparse.Namespace, tokens: tuple[int, int, int]) -> list[Case]:
    heads, dim, ffn, text = (12, 128, 8960, 512) if not args.quick else (2, 16, 64, 8)
    model = randomize(
        WanTransformer3DModel(
            num_attention_heads=heads, attention_head_dim=dim, ffn_dim=ffn, text_dim=64, freq_dim=32, num_layers=1,
            cross_attn_norm=True,
        )
    )  # fmt: skip
    inputs = {
        "hidden_states": randn(1, 16, tokens[0], 2 * tokens[1], 2 * tokens[2]),
        "encoder_hidden_states": randn(1, text, 64, seed=1),
        "timestep": torch.tensor([500.0]),
    }
    seq, width = tokens[0] * tokens[1] * tokens[2], heads * dim
    linear = 2 * seq * width * (6 * width + 2 * ffn) + 4 * text * width * width
    dense = 4 * seq * seq * width
    return _cases("Wan 1.3B, one block", model, inputs, tokens, linear, dense, args)


def sana(args: argparse.Namespace, tokens: tuple[int, int, int]) -> list[Case]:
    heads, dim, text = (20, 112, 300) if not args.quick else (2, 12, 8)
    width = heads * dim
    model = randomize(
        SanaVideoTransformer3DModel(
            num_attention_heads=heads, attention_head_dim=dim, num_layers=1, num_cross_attention_heads=heads,
            cross_attention_head_dim=dim, cross_attention_dim=width, caption_channels=64, mlp_ratio=3.0,
        )
    )  # fmt: skip
    inputs = {
        "hidden_states": randn(1, 16, tokens[0], 2 * tokens[1], 2 * tokens[2]),
        "encoder_hidden_states": randn(1, text, 64, seed=1),
        "timestep": torch.tensor([500.0]),
    }
    seq = tokens[0] * tokens[1] * tokens[2]
    linear = 2 * seq * width * (6 * width + 9 * width + 3 * width) + 4 * seq * dim * width
    return _cases("SANA-Video 2B, one block", model, inputs, tokens, linear, 0, args)


def _cases(
    name: str, model: nn.Module, inputs: dict[str, Any], tokens: tuple[int, int, int], linear: int, dense: int,
    args: argparse.Namespace,
) -> list[Case]:  # fmt: skip
    def call(m: nn.Module) -> Tensor:
        return m(**inputs, return_dict=False)[0]

    def check() -> None:
        before = call(model)
        assert relative(exact(), before) < 2e-5

    exact = Swapped(model, call)
    label = f"{name}, {tokens[0]}x{tokens[1]}x{tokens[2]} tokens"
    case = Case(label, {"hhattn": exact, "diffusers": partial(call, model)}, check, flops=linear + dense)
    case.goals["diffusers"] = 1.2
    if not dense:
        return [case]
    layout = hhattn.VideoLayout(*tokens)
    mask = pattern(layout)
    executed = int(dense * mask.block_density)
    kind = f"sliding tile, {mask.block_density:.0%} of blocks"
    case.contenders[f"hhattn, {kind}"] = Swapped(model, call, attention=mask)
    q, k, v = (randn(1, layout.seq_len, 12, 128, seed=i) for i in range(3))
    alone = {
        "hhattn": partial(hhattn.block_sparse_attention, q, k, v, mask, order="raster"),
        "hhattn, every block": partial(hhattn.attention, q, k, v),
        "SDPA": partial(sdpa, q, k, v),
    }
    return [case, Case(f"its attention alone, {kind}", alone, check, flops=executed, goals={"SDPA": 2.0})]


def main() -> None:
    args = options(__doc__ or "", dtypes=("float32",))
    tokens = (8, 32, 32) if not args.quick else (4, 8, 8)
    with torch.no_grad():
        report("swap", [*wan(args, tokens), *sana(args, tokens)], args)


if __name__ == "__main__":
    main()
