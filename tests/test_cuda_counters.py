"""What the CUDA kernels ask of memory, counted by the emulator: on aligned shapes no global access touches more sectors
than its bytes need, and none of shared memory takes more passes over the banks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import randn

import hhattn
import hhattn.ops.norm_modulate
import hhattn.ops.qk_norm_rope  # define the operators
from hhattn import simt

pytestmark = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="the emulator is built with g++")
BF16 = torch.bfloat16


def norm_modulate() -> None:
    x, row = randn(2, 8, 1536, seed=1).to(BF16), randn(2, 2, 1536, seed=2).to(BF16)
    torch.ops.hhattn_cuda.norm_modulate(x, row, row.clone(), None, None, x.clone(), row.clone(), True, 1e-6)


def norm_modulate_backward() -> None:
    """Sums over more than a piece, own and shared by the batch."""
    x, row = randn(2, 24, 1536, seed=1).to(BF16), randn(2, 2, 1536, seed=2).to(BF16)
    args = (x.clone(), None, x, row, row[:1].clone(), None, None, x.clone(), row.clone(), True, 1e-6)
    torch.ops.hhattn_cuda.norm_modulate_backward(*args)


def _attention(gradients: bool) -> None:
    """Full and partial blocks of 128, two query heads for a key head."""
    q, k, v = (
        randn(1, 256, heads, 128, seed=i).to(BF16).requires_grad_(gradients) for i, heads in enumerate((2, 1, 1))
    )
    keep = torch.ones(1, 1, 256, 256, dtype=torch.bool).tril()
    mask = hhattn.BlockMask.from_dense(keep, block_size=(128, 128))
    out, lse = hhattn.block_sparse_attention(q, k, v, mask, return_lse=True, impl="cuda")
    if gradients:
        (out.float().sum() + lse.sum()).backward()


def linear_attention() -> None:
    """Two chunks of a head of 112, rotated, forward and backward."""
    q, k, v = (randn(1, 512, 1, 112, seed=i).to(BF16).requires_grad_() for i in range(3))
    rope = hhattn.rope_3d((1, 16, 32), 112)
    hhattn.block_linear_attention(q, k, v, chunk_lens=256, rope=rope, impl="cuda").float().sum().backward()


def _rope(across_heads: bool, gradients: bool) -> None:
    """Heads of 128, more tokens than a block of single norms takes."""
    q, k = (randn(1, 40, heads, 128, seed=heads).to(BF16) for heads in (4, 2))
    cos, sin = randn(1, 40, 1, 128, seed=3).to(BF16), randn(1, 40, 1, 128, seed=4).to(BF16)
    weights = [randn(h * 128 if across_heads else 128, seed=5).to(BF16) for h in (4, 2)]
    args = (q, k, cos, sin, *weights, None, None, 1, across_heads, True, 1e-6, 0, None)
    if gradients:
        torch.ops.hhattn_cuda.qk_norm_rope_backward(q.clone(), k.clone(), *args, False)
    else:
        torch.ops.hhattn_cuda.qk_norm_rope(*args)


CASES: dict[str, tuple[int, Callable[[], None]]] = {
    "norm_modulate": (80, norm_modulate),
    "norm_modulate_backward": (80, norm_modulate_backward),
    "qk_norm_rope": (80, lambda: _rope(False, False)),
    "qk_norm_rope_across": (80, lambda: _rope(True, False)),
    "qk_norm_rope_backward": (80, lambda: _rope(False, True)),
    "qk_norm_rope_backward_across": (80, lambda: _rope(True, True)),
    "block_sparse_attention": (80, lambda: _attention(gradients=False)),
    "block_sparse_attention_sm90": (90, lambda: _attention(gradients=False)),
    "block_sparse_attention_backward": (80, lambda: _attention(gradients=True)),
    "block_linear_attention": (80, linear_attention),
}

#: Beginnings of lines outside of main loops that may cost so many times their minimum, and why that is little.
KNOWN = {
    "state[place(s, n, lane)] = ": 1.2,  # a state, once a piece; the last 16 of 112 rows leave half of the lanes idle
    "halves[0] = ": 2.0,  # float32 sums of norms over tokens, once in a piece of them
    "a.delta[at] = ": 2.0,  # a number a row and head, beside rows of dout and out; neighbours in a warp are heads
    "a.log2[at] = ": 2.0,
    "ptx::cp_async<8>(to + 8 * i": 2.0,  # half a row of a partial block; the other half is in the cache
}


def _allowed(line: str) -> float:
    return next((factor for begin, factor in KNOWN.items() if line.startswith(begin)), 1.0)


@pytest.mark.parametrize("name", CASES)
def test_accesses_cost_what_their_bytes_need(name: str) -> None:
    arch, call = CASES[name]
    with simt.emulate(arch, seed=1, counters=True) as session:
        call()
        counters = session.counters
        assert not session.reports, "\n".join(map(str, session.reports))
    assert any(c.space == "global" and c.write for c in counters)
    worse = []
    for c in counters:
        line = Path(c.file).read_text().splitlines()[c.line - 1].strip()
        if c.cost > c.minimum * _allowed(line):
            where = f"{Path(c.file).name}:{c.line}: {line}"
            worse.append(f"{where}: {c.space}, {c.bytes} bytes a lane: {c.cost} where {c.minimum} are enough")
    assert not worse, "\n".join(worse)
    widest = sum(c.lanes * c.bytes for c in counters if c.space == "global" and c.bytes == 16)
    assert widest > 0.8 * sum(c.lanes * c.bytes for c in counters if c.space == "global"), "most bytes move by sixteens"
