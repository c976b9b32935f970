"""Checks that ops make of their arguments before work starts; each raises naming the argument and what is accepted."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def tensor(name: str, value: object, ndim: int) -> None:
    """``value`` is a floating tensor of ``ndim`` dimensions in one of :data:`DTYPES`, else TypeError or ValueError."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float16 or bfloat16, got {str(value.dtype).removeprefix('torch.')}")
    if value.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got shape {tuple(value.shape)}")


def floating(name: str, value: object) -> None:
    """``value`` is a tensor of some floating dtype, for arguments that are converted to the dtype of the sums."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must have a floating dtype, got {str(value.dtype).removeprefix('torch.')}")


def shape(name: str, value: Tensor, expected: Sequence[int], meaning: str) -> None:
    """``value`` has exactly the shape ``expected``, which ``meaning`` names in letters."""
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{name} must have shape {meaning} = {tuple(expected)}, got {tuple(value.shape)}")


def device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """``value`` is on the device of ``other``."""
    if value.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}, got {value.device}")


def one_of(name: str, value: object, accepted: Sequence[object]) -> None:
    """``value`` is one of ``accepted``."""
    if value not in accepted:
        raise ValueError(f"{name}={value!r} is not accepted; choose one of {', '.join(repr(a) for a in accepted)}")


def eps(value: float) -> None:
    """``value`` is a finite number that is not negative."""
    if not isinstance(value, (int, float)):
        raise TypeError(f"eps must be a number, got {type(value).__name__}")
    if not 0 <= value < math.inf:
        raise ValueError(f"eps={value!r} must not be negative, infinite or NaN")
