"""What the kernel report compiles: each op as real models call it, on meta tensors, so that nothing is computed.

To add a kernel, add a function that returns a :class:`Case` and name it in :data:`CASES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hhattn.kernels import norm_modulate, qk_norm_rope


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
    chunk: int  # latent frames that linear attention takes together

    @property
    def seq(self) -> int:
        return self.frames * self.tokens

    @property
    def channels(self) -> int:
        return self.heads * self.dim


# 16 frames a second. Wan's codec takes 4 frames of 8x8 pixels and the transformer 2x2 cells of that; SANA-Video's 8
# frames of 32x32, the bundled one's 4 frames of 32x32.
MODELS = (
    Model("Wan 1.3B", 241, 45 * 80, 12, 128, 1, True, 3),
    Model("Wan 14B", 241, 45 * 80, 40, 128, 1, True, 3),
    Model("SANA-Video 2B", 120, 23 * 40, 20, 112, 120, True, 10),
    Model("bundled", 240, 23 * 40, 5, 32, 240, False, 4),
)


@dataclass(frozen=True)
class Case:
    """One call for one model.

    ``times``: for each kernel that the call launches, by name, how often a program runs each of its hot loops (see
    ``sass.hot_loops``), on average, in the order in which they stand. ``flops``: the operations that the op needs, by
    kernel; 0 where no tensor cores are.
    """

    op: str
    model: Model
    call: Callable[[], object]
    times: Mapping[str, Sequence[float]] = field(default_factory=dict)
    flops: Mapping[str, float] = field(default_factory=dict)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _norm_arguments(model: Model) -> tuple[Tensor, ...]:
    """x, modulation and gated residual, as a block of a transformer has them."""
    x, row = meta(1, model.seq, model.channels), meta(1, model.rows, model.channels)
    return x, row, row.clone(), x.clone(), row.clone()


def norm_modulate_forward(model: Model) -> Case:
    x, scale, shift, residual, gate = _norm_arguments(model)
    args = (x, scale, shift, None, None, residual, gate, True, 1e-6)
    return Case("norm_modulate", model, lambda: norm_modulate.norm_modulate(*args))


def norm_modulate_backward(model: Model) -> Case:
    x, scale, shift, residual, gate = _norm_arguments(model)
    args = (x, scale, shift, None, None, residual, gate, True, 1e-6)
    segment = model.seq // model.rows
    run = segment / math.ceil(segment / norm_modulate.RUN)
    call = lambda: norm_modulate.norm_modulate_backward(x.clone(), x.clone(), *args)  # noqa: E731
    return Case("norm_modulate", model, call, {"_backward": [run]})


def _rope_arguments(model: Model) -> tuple[object, ...]:
    q = meta(1, model.seq, model.heads, model.dim)
    angles = meta(1, model.seq, 1, model.dim, dtype=torch.float32)
    weight = meta(model.channels if model.across else model.dim)
    return (q, q.clone(), angles, angles.clone(), weight, weight, None, None, 1, model.across, True, 1e-6, 0, None)


def qk_norm_rope_forward(model: Model) -> Case:
    args = _rope_arguments(model)
    return Case("qk_norm_rope", model, lambda: qk_norm_rope.qk_norm_rope(*args))


def qk_norm_rope_backward(model: Model) -> Case:
    args = _rope_arguments(model)
    run = model.seq / math.ceil(model.seq / qk_norm_rope.RUN)
    q = args[0]
    call = lambda: qk_norm_rope.qk_norm_rope_backward(q.clone(), q.clone(), *args, False)  # noqa: E731
    return Case("qk_norm_rope", model, call, {"_backward": [run]})


CASES = (norm_modulate_forward, norm_modulate_backward, qk_norm_rope_forward, qk_norm_rope_backward)


def cases() -> list[Case]:
    return [case(model) for case in CASES for model in MODELS]
