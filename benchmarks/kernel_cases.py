"""What the kernel report compiles: each op as real models call it, on meta tensors, so that nothing is computed.

To add a kernel, add a function that returns a :class:`Case` and name it in :data:`CASES`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from compile_only import Launch, launches

from hhattn.kernels import (
    block_linear_attention,
    block_linear_attention_backward,
    block_sparse_attention,
    block_sparse_attention_tiles,
    norm_modulate,
    qk_norm_rope,
)


@dataclass(frozen=True)
class Model:
    """A clip of 60 s at 720x1280 in a video transformer: latent frames of ``tokens`` each, heads x dim channels."""

    name: str
    frames: int
    tokens: int
    heads: int
    dim: int
    rows: int  # of modulation: one for the clip, or one a latent frame
    across: bool  # whether q and k are normed over all heads at once
    chunk: int  # latent frames that linear attention takes together; 0 where there is none

    @property
    def seq(self) -> int:
        return self.frames * self.tokens

    @property
    def channels(self) -> int:
        return self.heads * self.dim


# 16 frames a second. Wan's codec takes 4 frames of 8x8 pixels and the transformer 2x2 cells of that; SANA-Video's 8
# frames of 32x32, the bundled one's 4 frames of 32x32.
MODELS = (
    Model("Wan 1.3B", 241, 45 * 80, 12, 128, 1, True, 0),
    Model("Wan 14B", 241, 45 * 80, 40, 128, 1, True, 0),
    Model("SANA-Video 2B", 120, 23 * 40, 20, 112, 120, True, 10),
    Model("bundled", 240, 23 * 40, 5, 32, 240, False, 4),
)


def _nothing(launch: Launch) -> Sequence[float]:
    return ()


def _no_products(launch: Launch) -> float:
    return 0.0


@dataclass(frozen=True)
class Case:
    """One call for one model. Of each launch that it makes:

    ``times``: how often a program runs each of the kernel's hot loops (see ``sass.hot_loops``), on average, in the
    order in which they stand. ``flops``: the operations on matrices that the op needs; 0 where there are none.
    ``leave_out``: launches of rare cases, which the report doesn't show. ``rare``: the share of a loop's runs that take
    what a branch usually leaves out. ``copied``: bytes that TMA copies for one run of the longest hot loop; ``warps``
    that execute the kernel, where they aren't all of a program's. ``inner``: how often a run of the loop around the hot
    one runs it, where what is around counts; ``times`` are then of the loop around.
    """

    op: str
    phase: str  # forward or backward
    model: Model
    call: Callable[[], object]
    times: Callable[[Launch], Sequence[float]] = _nothing
    flops: Callable[[Launch], float] = _no_products
    leave_out: Callable[[Launch], bool] = lambda launch: False
    rare: float = 1.0
    copied: Callable[[Any], float] = _no_products
    inner: Callable[[Any], float | None] = lambda launch: None
    warps: Callable[[Any], int | None] = lambda launch: None

    #: In what the kernels are written.
    by = "Triton"

    def counted(self, arch: int) -> list[tuple[Any, int]]:
        """What the call launches on a GPU of that architecture; of launches that share a compilation the first, and how
        many they are."""
        with mock.patch.object(block_sparse_attention_tiles, "architecture", return_value=arch):
            made = launches(self.call)
        return counted((launch for launch in made if not self.leave_out(launch)), lambda launch: launch.key(arch))

    def launches(self, arch: int) -> list[Any]:
        return [launch for launch, _ in self.counted(arch)]

    def moved_bytes(self, launch: Any) -> int:
        """Bytes of all tensors of a launch, each read or written once; what is shared by stride 0 counts once."""
        total = 0
        for tensor in {id(t): t for t in launch.args if isinstance(t, torch.Tensor)}.values():
            sizes = (n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or n == 0)
            total += math.prod(sizes) * tensor.element_size()
        return total


def counted(made: Iterable[Any], key: Callable[[Any], object]) -> list[tuple[Any, int]]:
    """Of those with one key the first, and how many there are."""
    kept: dict[object, list[Any]] = {}
    for each in made:
        kept.setdefault(key(each), []).append(each)
    return [(each[0], len(each)) for each in kept.values()]


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def norm_arguments(model: Model) -> tuple[Tensor, ...]:
    """x, modulation and gated residual, as a block of a transformer has them."""
    x, row = meta(1, model.seq, model.channels), meta(1, model.rows, model.channels)
    return x, row, row.clone(), x.clone(), row.clone()


def norm_forward(model: Model) -> Case:
    x, scale, shift, residual, gate = norm_arguments(model)
    args = (x, scale, shift, None, None, residual, gate, True, 1e-6)
    return Case("norm_modulate", "forward", model, lambda: norm_modulate.norm_modulate(*args))


def norm_backward(model: Model) -> Case:
    x, scale, shift, residual, gate = norm_arguments(model)
    args = (x.clone(), x.clone(), x, scale, shift, None, None, residual, gate, True, 1e-6)
    run = model.seq // model.rows / math.ceil(model.seq // model.rows / norm_modulate.RUN)
    call = lambda: norm_modulate.norm_modulate_backward(*args)  # noqa: E731
    return Case("norm_modulate", "backward", model, call, lambda launch: [run])


def rope_arguments(model: Model) -> tuple[object, ...]:
    q = meta(1, model.seq, model.heads, model.dim)
    angles = meta(1, model.seq, 1, model.dim, dtype=torch.float32)
    weight = meta(model.channels if model.across else model.dim)
    return (q, q.clone(), angles, angles.clone(), weight, weight, None, None, 1, model.across, True, 1e-6, 0, None)


def rope_forward(model: Model) -> Case:
    args = rope_arguments(model)
    return Case("qk_norm_rope", "forward", model, lambda: qk_norm_rope.qk_norm_rope(*args))


def rope_backward(model: Model) -> Case:
    dq, dk = (meta(1, model.seq, model.heads, model.dim) for _ in range(2))
    args = (dq, dk, *rope_arguments(model), False)
    run = model.seq / math.ceil(model.seq / qk_norm_rope.RUN)
    call = lambda: qk_norm_rope.qk_norm_rope_backward(*args)  # noqa: E731
    return Case("qk_norm_rope", "backward", model, call, lambda launch: [run])


BLOCK = 128  # queries and keys of a block of the mask
DENSITY = 0.1  # of the blocks; each is full
PARTIAL = 8  # blocks more in each row, of which bits say what is attended


def mask_blocks(model: Model) -> tuple[int, int]:
    """How many blocks of keys a block of queries attends: full ones, and partial ones."""
    return round(DENSITY * math.ceil(model.seq / BLOCK)), PARTIAL


def mask_flops(model: Model) -> float:
    """Operations of one product of all pairs of these blocks, over all heads."""
    return 2.0 * model.channels * math.ceil(model.seq / BLOCK) * sum(mask_blocks(model)) * BLOCK * BLOCK


def mask(model: Model) -> tuple[Tensor, ...]:
    """Lists of partial and of full blocks, shared by all heads, and tiles of bits."""
    n = math.ceil(model.seq / BLOCK)
    full, _ = mask_blocks(model)
    counts = [meta(1, 1, n, dtype=torch.int32) for _ in range(2)]
    lists = [meta(1, 1, n, width, dtype=torch.int32) for width in (PARTIAL, PARTIAL, full)]
    return counts[0], lists[0], lists[1], counts[1], lists[2], meta(64, BLOCK, BLOCK // 8, dtype=torch.uint8)


def _sparse(model: Model, phase: str, call: Callable[[], object]) -> Case:
    blocks = mask_blocks(model)
    products = {"_forward": 2, "_dq": 3, "_dkv": 4}

    def times(launch: Launch) -> Sequence[float]:
        """A program follows both lists; other kernels have no loops."""
        if launch.name not in products:
            return ()
        # dk and dv go along a column of the mask, of which the mean length is a row's
        parts = math.ceil(BLOCK / launch.options["BLOCK_M" if launch.name == "_dkv" else "BLOCK_N"])
        return [count * parts for count in blocks]

    def flops(launch: Launch) -> float:
        return products.get(launch.name, 0) * mask_flops(model)

    # a launch for tiles with values that aren't finite: its programs end at once
    return Case(
        "block_sparse_attention", phase, model, call, times, flops, lambda launch: bool(launch.options.get("EXACT"))
    )


def sparse_arguments(model: Model) -> tuple[object, ...]:
    qkv = [meta(1, model.seq, model.heads, model.dim) for _ in range(3)]
    return (*qkv, *mask(model), BLOCK, model.dim**-0.5)


def sparse_forward(model: Model) -> Case:
    args = sparse_arguments(model)
    return _sparse(model, "forward", lambda: block_sparse_attention.block_sparse_attention(*args))


def sparse_backward_arguments(model: Model) -> tuple[object, ...]:
    dout, q, k, v, out = (meta(1, model.seq, model.heads, model.dim) for _ in range(5))
    dlse, lse = (meta(1, model.heads, model.seq, dtype=torch.float32) for _ in range(2))
    return (dout, dlse, q, k, v, out, lse, *mask(model), BLOCK, model.dim**-0.5)


def sparse_backward(model: Model) -> Case:
    args = sparse_backward_arguments(model)
    return _sparse(model, "backward", lambda: block_sparse_attention.block_sparse_attention_backward(*args))


def _linear(model: Model, phase: str, call: Callable[[], object]) -> Case:
    length = model.chunk * model.tokens
    pieces = math.ceil(length / block_linear_attention.PIECE)

    def times(launch: Launch) -> Sequence[float]:
        """Programs take a piece of a chunk, tile by tile, or add up a chunk's pieces."""
        if launch.name == "_fold":
            return [pieces // 4, pieces % 4]  # unrolled by four, and the rest
        starts = range(0, length, block_linear_attention.PIECE)
        lengths = [min(block_linear_attention.PIECE, length - start) for start in starts]
        return [sum(math.ceil(n / launch.options["BLOCK_T"]) for n in lengths) / pieces]

    def flops(launch: Launch) -> float:
        return 0.0 if launch.name == "_fold" else 2.0 * model.seq * model.channels * model.dim

    return Case("block_linear_attention", phase, model, call, times, flops)


def linear_arguments(model: Model) -> tuple[list[Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Rows like q, tables of cosines and sines, and the state of every chunk."""
    chunks = math.ceil(model.frames / model.chunk)
    rows = [meta(1, model.seq, model.heads, model.dim) for _ in range(4)]
    tables = [meta(model.seq, model.dim, dtype=torch.float32) for _ in range(2)]
    state = [
        meta(1, model.heads, chunks, *shape, dtype=torch.float32) for shape in ((model.dim, model.dim), (model.dim,))
    ]
    return rows, (tables[0], tables[1]), (state[0], state[1])


RELU = 0


def linear_forward(model: Model) -> Case:
    (q, k, v, _), tables, state = linear_arguments(model)
    how = (*tables, model.chunk * model.tokens, [], RELU, RELU)

    def call() -> None:
        block_linear_attention.block_linear_sums(k, v, None, *how)
        block_linear_attention.block_linear_outputs(q, *state, *how, True, 1e-15)

    return _linear(model, "forward", call)


def linear_backward(model: Model) -> Case:
    (q, k, v, dout), tables, state = linear_arguments(model)
    how = (*tables, model.chunk * model.tokens, [], RELU, RELU)

    def call() -> None:
        out = torch.empty_like(q)
        block_linear_attention_backward.block_linear_outputs_backward(dout, q, *state, out, *how, True, 1e-15)
        block_linear_attention_backward.block_linear_sums_backward(*state, k, v, None, *how)

    return _linear(model, "backward", call)


CASES = (norm_forward, norm_backward, rope_forward, rope_backward, sparse_forward, sparse_backward)


def cases() -> list[Case]:
    """Every call; linear attention for the models that have it."""
    linear = [case(model) for case in (linear_forward, linear_backward) for model in MODELS if model.chunk]
    return [case(model) for case in CASES for model in MODELS] + linear
