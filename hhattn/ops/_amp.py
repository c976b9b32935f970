"""What autocast means for an op that takes several tensors of one dtype."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from hhattn.ops import _check


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype autocast wants on ``device``, or None where it is off or unknown (the meta device)."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def cast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v in autocast's dtype where it is on; float64 stays float64, both as in torch's own attention.

    Raises TypeError unless the three come out in one dtype.
    """
    dtype = autocast_dtype(q.device)
    if dtype is not None:
        q, k, v = (x.to(dtype) if x.dtype in _check.DTYPES else x for x in (q, k, v))
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype, one dtype for q, k and v, {q.dtype}, got {x.dtype}")
    return q, k, v


def off(device: torch.device) -> AbstractContextManager[object]:
    """A context without autocast, for sums that must stay float32."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)
