"""The norms of a diffusers block: when its forward may be replaced by one that fuses them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from hhattn.integrations.swap import Swap


def why_not_fused(block: nn.Module, kind: str, arguments: tuple[str, ...], norms: tuple[nn.Module, ...]) -> str | None:
    """None where ``block`` is exactly a ``kind``, its forward takes ``arguments`` and its ``norms`` are layer norms."""
    if type(block).__name__ != kind:
        return f"the block is a {type(block).__name__}"
    if "forward" in block.__dict__:
        return "someone replaced the block's forward"
    if tuple(inspect.signature(type(block).forward).parameters) != ("self", *arguments):
        return "this release of diffusers calls the block with other arguments"
    other = [type(norm).__name__ for norm in norms if not isinstance(norm, (nn.LayerNorm, nn.Identity))]
    return f"a norm is a {other[0]}" if other else None


def swap_forward(
    handle: Swap,
    path: str,
    block: Any,
    forward: Callable[..., Any],
    norms: bool,
    kind: str,
    names: tuple[str, ...],
) -> None:
    """Give ``block`` the fused ``forward`` if it is what ``forward`` was written for; written down either way."""
    arguments = tuple(inspect.signature(forward).parameters)[1:]
    fused = tuple(getattr(block, name) for name in names)
    why = why_not_fused(block, kind, arguments, fused) if norms else "norms=False"
    if why is None:
        handle.set_forward(path, block, forward)
        handle.swapped(path, "block norms", "hhattn.norm_modulate")
    else:
        handle.left(path, "block norms", why)


def layer_norm(norm: Any) -> dict[str, Any]:
    """The arguments of :func:`hhattn.norm_modulate` that make it this LayerNorm."""
    return {"norm": "layer", "eps": norm.eps, "weight": norm.weight, "bias": norm.bias}
