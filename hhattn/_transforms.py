"""Which of torch's function transforms are under way. An operator that has a backward and nothing else must know: under
forward mode torch would take its derivative for zero, and say nothing."""

from __future__ import annotations

from torch._C import _functorch
from torch.autograd import forward_ad


def forward_mode() -> bool:
    """Whether tangents are carried along: ``torch.func.jvp`` and what is built on it, or ``forward_ad.dual_level``."""
    return forward_ad._current_level >= 0


def derivative() -> bool:
    """Whether a derivative is taken by ``torch.func`` (grad, vjp, jvp, ...) or in forward mode. ``torch.autograd`` and
    ``torch.func.vmap`` alone are no such thing."""
    kinds = (_functorch.TransformType.Grad, _functorch.TransformType.Jvp)
    return forward_mode() or any(level.key() in kinds for level in _functorch.get_interpreter_stack() or ())


def active() -> bool:
    """Whether any of them is under way, ``torch.func.vmap`` among them."""
    return forward_mode() or bool(_functorch.get_interpreter_stack())


# Dynamo, which enters the transforms it traces, calls these while tracing. It guards compiled code by the transforms
# around it. (torch.compiler.assume_constant_result does the same, and imports Dynamo, which takes a second.)
for _function in (forward_mode, derivative, active):
    _function._dynamo_marked_constant = True  # type: ignore[attr-defined]
