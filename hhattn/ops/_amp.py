"""What autocast means for an op that takes several tensors of one dtype."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype autocast wants on ``device``, or None where it is off or unknown (the meta device)."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def cast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """``tensors`` in autocast's dtype, as torch's own attention casts q, k and v; unchanged where it is off."""
    dtype = autocast_dtype(tensors[0].device)
    return tensors if dtype is None else tuple(x.to(dtype) for x in tensors)


def off(device: torch.device) -> AbstractContextManager[object]:
    """A context without autocast, for sums that must stay float32."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)
