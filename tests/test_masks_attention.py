"""Attention under every static mask: the numbers of SDPA with the dense mask, and of FlexAttention with the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import IMPLS
from helpers import assert_close_to_fp64, randn
from mask_patterns import examples
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from hhattn import BlockMask, VideoLayout, block_sparse_attention

LAYOUTS = [
    VideoLayout(3, 5, 7, tile=(2, 2, 3), text_len=4),
    VideoLayout(4, 3, 6, tile=(1, 3, 4), text_len=5, text_first=True),
]
NAMES = list(examples(LAYOUTS[0]))


def inputs(mask: BlockMask, head_dim: int = 16) -> list[Tensor]:
    """q, k, v [B, S, 2, D]."""
    batch = mask.kv_num_blocks.shape[0]
    return [randn(batch, n, 2, head_dim, seed=i) for i, n in enumerate((mask.q_len, mask.k_len, mask.k_len))]


def sdpa(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """PyTorch's own with the dense mask; a row that attends nothing is 0."""
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=keep)
    return out.where(keep.any(-1, keepdim=True), 0).transpose(1, 2)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("layout", "order"),
    [(LAYOUTS[0], "raster"), (LAYOUTS[1], "tile")],
    ids=["text last, raster order", "text first, tile order"],
)
@pytest.mark.parametrize("name", NAMES)
def test_equals_sdpa_with_the_dense_mask(name: str, layout: VideoLayout, order: str, impl: str) -> None:
    mask = examples(layout, block_size=(32, 16), order=order)[name]
    keep = mask.to_dense(order="raster")
    own = torch.float16 if impl == "cuda" else torch.float32
    qkv = [x.to(own) for x in inputs(mask)]
    upstream = randn(*qkv[0].shape, dtype=own, seed=7)
    results: dict[str, list[Tensor]] = {}
    for what, dtype in (("ours", own), ("expected", torch.float64), ("baseline", own)):
        leaves = [x.to(dtype).requires_grad_() for x in qkv]
        if what == "ours":
            out = block_sparse_attention(*leaves, mask, order="raster", impl=impl)
        else:
            out = sdpa(*leaves, keep)
        results[what] = [out, *torch.autograd.grad(out, leaves, upstream.to(dtype))]
    for i, part in enumerate(("out", "dq", "dk", "dv")):
        ours, expected, baseline = (results[what][i] for what in ("ours", "expected", "baseline"))
        assert_close_to_fp64(ours, expected, baseline, factor=3 if i else 2, ulps=8, name=part)


def compare_with_flex(mask: BlockMask, attention: Any, head_dim: int) -> None:
    """Rows that attend nothing are left out: FlexAttention's value there depends on its version."""
    q, k, v = inputs(mask, head_dim)
    out = attention(*(x.transpose(1, 2).contiguous() for x in (q, k, v)), block_mask=mask.to_flex()).transpose(1, 2)
    ours = block_sparse_attention(q, k, v, mask)
    seen = mask.to_dense().any(-1).transpose(1, 2)[..., None].expand_as(ours)
    torch.testing.assert_close(ours[seen], out[seen], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("order", ["raster", "tile"])
@pytest.mark.parametrize("name", NAMES)
def test_to_flex_gives_flex_attentions_output(name: str, order: str) -> None:
    compare_with_flex(examples(LAYOUTS[0], block_size=(32, 16), order=order)[name], flex_attention, 16)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_to_flex_gives_compiled_flex_attentions_output(name: str) -> None:
    layout = VideoLayout(5, 9, 10, tile=(2, 4, 4), text_len=20)
    torch._dynamo.reset()
    compare_with_flex(examples(layout, block_size=(64, 128), order="tile")[name], torch.compile(flex_attention), 32)
