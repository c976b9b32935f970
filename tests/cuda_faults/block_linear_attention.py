"""Faults of block_linear_attention: chunks cut short, tokens of several blocks of threads, head dims that fill a kernel
and such as don't."""

from __future__ import annotations

import linear_oracle as linear
import torch
from helpers import assert_close_to_fp64

from cuda_faults import NUMBERS, Fault, Run
from hhattn import block_linear_attention

DEFINES = ("HH_HEAD_DIMS=32",)


def forward(sizes: tuple[int, ...], chunk: int, names: set[str], **how: object) -> None:
    """Outputs and state, in bfloat16."""
    batch, tokens, heads, _, dim, dim_v = sizes
    lens = linear.lens_of(chunk, tokens)
    given = [x.to(torch.bfloat16) for x in linear.inputs(*sizes)]
    extra = linear.options(batch, tokens, heads, dim, dim_v, len(lens), names)
    wide, base = ({n: linear.to(x, dtype) for n, x in extra.items()} for dtype in (torch.float64, torch.float32))
    expected = linear.oracle(*(x.double() for x in given), lens, **wide, **how)
    baseline = linear.oracle(*(x.float() for x in given), lens, **base, **how)
    out, state = block_linear_attention(*given, chunk_lens=chunk, output_final_state=True, impl="cuda", **base, **how)
    for name, a, e, b in zip(("out", "kv", "k_sum"), (out, *state), expected, baseline, strict=True):
        assert_close_to_fp64(a, e, b.to(a.dtype), ulps=8, name=name)


def whole() -> None:
    """Heads of 32, rotated, as the kernels for the usual case take them."""
    forward((1, 70, 2, 2, 32, 32), 40, {"rope"})


def cut() -> None:
    """Heads that fill no kernel, gated."""
    forward((2, 21, 2, 1, 20, 12), 16, {"rope", "key_gate"}, feature_map="elu1", eps=1e-3)


def softmax() -> None:
    forward((1, 40, 1, 1, 20, 12), 40, set(), feature_map="softmax", eps=1e-3)


def pieces() -> None:
    """A chunk of three pieces."""
    forward((1, 600, 1, 1, 16, 16), 600, set(), feature_map="identity", normalize=False)


def backward() -> None:
    linear.compare("cuda", torch.bfloat16, (1, 37, 1, 1, 32, 32), 20, {"rope", "key_gate"}, eps=1e-3)


RUNS = {
    name: Run(call, DEFINES)
    for name, call in {"whole": whole, "cut": cut, "softmax": softmax, "pieces": pieces, "backward": backward}.items()
}

FILE, BACK = "block_linear_attention.cu", "block_linear_attention_backward.cu"
ROWS, STATE = "linear_rows.cuh", "linear_state.cuh"
FAULTS = [
    Fault("a tile of tokens read before it landed", "whole", "async-pending", FILE,
          "    ptx::cp_async_wait<0>();\n    __syncthreads();", "    ptx::cp_async_wait<1>();\n    __syncthreads();"),
    Fault("no barrier between a tile's copies and its readers", "whole", "race", FILE,
          "    __syncthreads();  // this tile is there, and the other one no longer read\n", ""),
    Fault("a token of the next chunk summed", "whole", NUMBERS, FILE,
          "const bool there = at + row + i < p.end;", "const bool there = at + row + i <= p.end;"),
    Fault("outputs stored beyond the last token", "whole", "global-oob", FILE,
          "      if (token + 8 * i >= p.end) continue;\n", ""),
    Fault("the least of a key's three parts dropped", "whole", NUMBERS, FILE,
          "      products<3>(psi, row);", "      products<2>(psi, row);"),
    Fault("rows of a transposed load off their alignment", "whole", "misaligned", FILE,
          "lane / 16 * 4) * 4;", "lane / 16 * 2) * 4;"),
    Fault("no barrier between a state and its readers", "whole", "race", FILE,
          "  __syncthreads();\n  for (int64_t token", "  for (int64_t token"),
    Fault("columns of a state swapped", "whole", NUMBERS, STATE,
          "4 * (pair / 2 * 2 + e) + t", "4 * (pair / 2 * 2 + 1 - e) + t"),
    Fault("every chunk sees the first one's state", "whole", NUMBERS, FILE,
          "* a.places + a.place + p.chunk;", "* a.places + a.place;"),
    Fault("a rotation's sine with the other sign", "whole", NUMBERS, ROWS,
          "{x.x * cos - x.y * sin, x.x * sin + x.y * cos}", "{x.x * cos + x.y * sin, x.y * cos - x.x * sin}"),
    Fault("the maps of zeros beyond the end counted", "cut", NUMBERS, FILE,
          "if (at + token < p.end) total.x", "total.x"),
    Fault("half of a key ungated", "cut", NUMBERS, FILE,
          "psi[i].x *= gate, psi[i].y *= gate;", "psi[i].x *= gate;"),
    Fault("no barrier before softmax's sums are read", "softmax", "race", FILE,
          "    __syncthreads();\n  }\n\n  // 16 tokens from", "  }\n\n  // 16 tokens from"),
    Fault("a piece left out", "pieces", NUMBERS, FILE,
          "for (int64_t i = 1; i < a.pieces; ++i)", "for (int64_t i = 2; i < a.pieces; ++i)"),
    Fault("gradients rotated instead of back", "backward", NUMBERS, BACK,
          "step.cos.y, step.sin.y);\n#pragma", "step.cos.y, -step.sin.y);\n#pragma"),
    Fault("the denominator's gradient with the wrong sign", "backward", NUMBERS, BACK,
          "e = -by.of(by.of(both.y));", "e = by.of(by.of(both.y));"),
    Fault("the gate's gradient stored for the wrong head or token", "backward", "global-oob", BACK,
          "a.dgate[place] = both.y;", "a.dgate[place + r.heads] = both.y;"),
]  # fmt: skip
