"""What every test file shares: the accuracy rule of the project, and inputs that are awkward on purpose."""

from __future__ import annotations

import os

import torch
from torch import Tensor

#: Where the tensors of the ops' tests lie.
DEVICE = os.environ.get("HHATTN_TEST_DEVICE", "cpu")


def _error(value: Tensor, expected64: Tensor, where: Tensor) -> tuple[float, float]:
    """Largest and root-mean-square error over ``where``."""
    diff = (value.double() - expected64)[where].abs()
    return (diff.max().item(), diff.square().mean().sqrt().item()) if diff.numel() else (0.0, 0.0)


def assert_close_to_fp64(
    actual: Tensor,
    expected64: Tensor,
    baseline: Tensor,
    factor: float = 2.0,
    ulps: float = 4.0,
    name: str = "result",
) -> None:
    """The accuracy rule: the error of ``actual`` against the fp64 ``expected64`` is at most ``factor`` times the error
    of ``baseline`` (the same formula in plain PyTorch, in the dtype of ``actual``), plus ``ulps`` units in the last
    place of the expected values. It holds for the largest error and for the root-mean-square one, so neither a single
    wrong element nor a small error everywhere gets through. Use ``factor=3`` for gradients.

    ``actual``, ``expected64`` and ``baseline`` have the same shape. Where ``expected64`` is infinite ``actual`` must be
    the same infinity; a NaN in ``actual`` fails unless it is expected.
    """
    assert expected64.dtype == torch.float64, f"{name}: expected64 must be float64, got {expected64.dtype}"
    assert actual.shape == expected64.shape == baseline.shape, (
        f"{name}: shapes differ: actual {tuple(actual.shape)}, expected {tuple(expected64.shape)}, "
        f"baseline {tuple(baseline.shape)}"
    )
    actual, expected64, baseline = actual.detach(), expected64.detach(), baseline.detach()
    finite = expected64.isfinite()
    torch.testing.assert_close(actual[~finite].double(), expected64[~finite], rtol=0, atol=0, equal_nan=True)
    assert actual[finite].isfinite().all(), f"{name}: {(~actual[finite].isfinite()).sum()} elements are not finite"
    magnitude = expected64[finite].abs()
    if not magnitude.numel():
        return
    eps = torch.finfo(actual.dtype).eps
    sizes = (magnitude.max().item(), magnitude.square().mean().sqrt().item())
    errors = _error(actual, expected64, finite)
    allowed = _error(baseline, expected64, finite & baseline.isfinite())
    for kind, err, base, size in zip(("largest", "rms"), errors, allowed, sizes, strict=True):
        bound = factor * base + ulps * eps * size
        assert err <= bound, (
            f"{name}: {kind} error {err:.3e} > {bound:.3e} = {factor} x {base:.3e} (PyTorch, {actual.dtype}) "
            f"+ {ulps} ulp of {size:.3e}"
        )


def strided(x: Tensor, dim: int = 1) -> Tensor:
    """``x`` with the same values on memory that has gaps along ``dim`` (the last dim stays contiguous); the gaps hold
    NaN, so an implementation that ignores strides is found out."""
    shape = list(x.shape)
    shape[dim] *= 2
    room = torch.full(shape, float("nan"), dtype=x.dtype, device=x.device)
    view = room.unflatten(dim, (x.shape[dim], 2)).select(dim + 1, 1)
    view.copy_(x)
    return view.requires_grad_(x.requires_grad) if x.is_leaf else view


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = DEVICE) -> Tensor:
    """Seeded normal numbers, drawn in float64 on the CPU and rounded to ``dtype``: every dtype and device sees the same
    values, nearly."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(*shape, dtype=torch.float64, generator=generator, device="cpu")
    return drawn.to(device=device, dtype=dtype)
