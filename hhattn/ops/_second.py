"""Second derivatives of ops whose kernels' gradient has none of its own: by the formula, or refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def differentiable_gradient(
    reference: Callable[..., Any], args: Sequence[Any], needed: Sequence[bool], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients of ``reference(*args)`` in those arguments that are ``needed``, None for the others, themselves
    differentiable: for ``create_graph=True``, in an autograd function's backward, where grad mode tells.

    ``grads`` are the gradients in the outputs, None for zero.
    """
    outputs = reference(*args)
    pairs = zip(outputs if isinstance(outputs, tuple) else (outputs,), grads, strict=False)
    used, upstream = zip(*((out, grad) for out, grad in pairs if grad is not None), strict=True)
    wanted = [arg for arg, need in zip(args, needed, strict=True) if need]
    found = iter(torch.autograd.grad(used, wanted, upstream, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needed]


def no_second_derivative(op: str, operator: str, instead: str = "") -> None:
    """Make ``operator``, a gradient of ``op``, refuse to be differentiated, where torch would only warn. ``instead``:
    what the error offers."""

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"hhattn.{op}: a gradient made with create_graph=True is differentiated, and {operator} has no derivative"
            + (instead and f"; {instead}")
        )

    torch.library.register_autograd(operator, refuse)
