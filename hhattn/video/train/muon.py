"""Muon: momentum, then the nearest orthogonal matrix as the step (Jordan et al. 2024), in float32.

torch.optim.Muon orthogonalises in bfloat16, which many CPUs multiply a hundred times slower than float32.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def orthogonalize(g: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration towards U·Vᵀ of each matrix of ``g [n, r, c]``, r ≤ c."""
    x = g / (g.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    return x


class Muon(torch.optim.Optimizer):
    """For matrices, and for kernels seen as (outputs, everything else). The step's root mean square matches AdamW's,
    so AdamW's learning rates carry over (Moonlight)."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[tuple[int, int], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault((p.shape[0], p[0].numel()), []).append(p)
            for (rows, cols), params in shapes.items():  # equal shapes share one batched iteration
                updates = []
                for p in params:
                    m = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    m.mul_(group["momentum"]).add_(p.grad)
                    updates.append((p.grad + group["momentum"] * m).flatten(1))
                g = torch.stack(updates)
                o = orthogonalize(g.mT).mT if rows > cols else orthogonalize(g)
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                steps = [step.view_as(p) for step, p in zip(o.unbind(0), params, strict=True)]
                torch._foreach_add_(params, steps, alpha=-group["lr"] * 0.2 * max(rows, cols) ** 0.5)
