"""Faults of block_sparse_attention's kernels on mma.sync: two query heads for each key head, several tiles of keys and
of queries, ragged ends, full and partial blocks, rows that attend nothing."""

from __future__ import annotations

import torch
from helpers import assert_close_to_fp64, randn, strided
from test_block_sparse_attention import compare_with_formula, dense_formula, random_keep
from torch import Tensor

import hhattn
from cuda_faults import NUMBERS, Fault, Run
from hhattn import BlockMask

SHAPE = ("HH_HEAD_DIMS=64", "HH_ONE_DTYPE=hh::bf16")
BLOCK = (64, 64)


def _keep() -> Tensor:
    keep = random_keep(1, 4, 100, 250, share=0.4)
    keep[:, ::2, :64, 64:192] = True  # full blocks
    keep[:, 1, 70:80] = False
    keep[..., 5] = False
    return keep


def _inputs() -> list[Tensor]:
    shapes = [(100, 4, 64), (250, 2, 64), (250, 2, 64)]
    q, k, v = (strided(randn(1, *shape, dtype=torch.bfloat16, seed=i)) for i, shape in enumerate(shapes))
    k *= torch.linspace(0.2, 5, 250)[:, None, None].to(k)  # maxima grow, so that sums are scaled anew
    return [q, k, v]


def check_forward(keep: Tensor, block: tuple[int, int], qkv: list[Tensor], poison: float | None) -> None:
    """out and lse; lse against the formula in float32, which is how exact it is. ``poison``: a value of the sixth key,
    which nobody attends."""
    q, k, v = qkv
    expected = dense_formula(q.double(), k.double(), v.double(), keep)
    baseline = dense_formula(q, k, v, keep)[0], dense_formula(q.float(), k.float(), v.float(), keep)[1]
    if poison is not None:
        v[:, 5] = poison
    mask = BlockMask.from_dense(keep, block_size=block)
    actual = hhattn.block_sparse_attention(q, k, v, mask, return_lse=True, impl="cuda")
    for name, *values in zip(("out", "lse"), actual, expected, baseline, strict=True):
        assert_close_to_fp64(*values, name=name)


def forward(poison: float | None = None) -> None:
    """out and lse."""
    check_forward(_keep(), BLOCK, _inputs(), poison)


def poisoned() -> None:
    """A value that nobody attends is infinite."""
    forward(torch.inf)


def backward() -> None:
    """The gradients."""
    with hhattn.use_impl("cuda"):
        compare_with_formula(_keep(), BLOCK, _inputs(), empty=True)


RUNS = {"forward": Run(forward, SHAPE), "poisoned": Run(poisoned, SHAPE), "backward": Run(backward, SHAPE)}

FORWARD, BACKWARD = "block_sparse_attention.cu", "block_sparse_attention_backward.cu"
LISTS, TILES = "block_sparse_lists.cuh", "block_sparse_tiles.cuh"
FAULTS = [
    Fault("wait for one group of copies too few", "forward", "async-pending", FORWARD,
          "ptx::cp_async_wait<1>();\n    __syncthreads();  // keys and bits",
          "ptx::cp_async_wait<2>();\n    __syncthreads();  // keys and bits"),
    Fault("no barrier before keys are multiplied", "forward", "race", FORWARD,
          "    __syncthreads();  // keys and bits are there, the last values done with\n", ""),
    Fault("no barrier before values take the keys' place", "forward", "race", FORWARD,
          "    __syncthreads();  // values are there, keys and bits done with\n", ""),
    Fault("query tail not bounded", "forward", "global-oob", FORWARD,
          "rows = min(a.mask.bq - start, a.q_len - first);", "rows = a.mask.bq - start;"),
    Fault("sum of weights not scaled anew", "forward", NUMBERS, FORWARD, "        sums.total[a][r] *= keep;\n", ""),
    Fault("sums over half of the keys left out", "forward", NUMBERS, FORWARD,
          "x = x * keep[0] + other * keep[1];", "x = x * keep[0];"),
    Fault("log of the weights' sum in base 2", "forward", NUMBERS, FORWARD,
          "(sums.top[i][r] * c + ptx::log2(total)) * LN_2", "sums.top[i][r] * c + ptx::log2(total)"),
    Fault("half of a partial block's bits for all of it", "forward", NUMBERS, LISTS,
          "(part.start + key) / 32 % 2 * 4", "0"),
    Fault("a list's blocks taken in the order of another's", "forward", NUMBERS, LISTS,
          "    if (left_ == 0) at_ = partial_;\n", ""),
    Fault("last row of a tile not copied", "forward", "uninitialized", TILES,
          "for (int i = 0; i < ROWS / STEP; ++i, source", "for (int i = 0; i < ROWS / STEP - 1; ++i, source"),
    Fault("rows that infinities touched left as they are", "poisoned", NUMBERS, TILES,
          "rows |= (lanes >> 4 * i & 15) ? 1u << i : 0;", ""),
    Fault("no barrier before the next values come", "backward", "race", BACKWARD,
          "    __syncthreads();  // the values are done with\n", ""),
    Fault("queries of the next tile not waited for", "backward", "async-pending", BACKWARD,
          "ptx::cp_async_wait<0>();\n      __syncthreads();  // queries are there",
          "ptx::cp_async_wait<1>();\n      __syncthreads();  // queries are there"),
    Fault("delta forgotten", "backward", NUMBERS, BACKWARD, "(ds[i][j][e] - delta[i][e / 2])", "ds[i][j][e]"),
    Fault("gradient of keys without the scale", "backward", NUMBERS, BACKWARD,
          "scaled[1][2] = {{a.scale, a.scale}}", "scaled[1][2] = {{1.0f, 1.0f}}"),
    Fault("one query head of a group adds to the keys", "backward", NUMBERS, BACKWARD,
          "head < (kv_head + 1) * group; ++head) {\n    const uint32_t q",
          "head < kv_head * group + 1; ++head) {\n    const uint32_t q"),
    Fault("every warp takes the first keys' bits", "backward", NUMBERS, BACKWARD,
          "((start + warp_row) % 32 + lane / 4)", "(lane / 4)"),
]  # fmt: skip
