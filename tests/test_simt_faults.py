"""The emulated tests can fail: each fault that is seeded into a kernel or its PTX is caught, by the report or the rule
of accuracy that is named beside it, and the same run without it is clean."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("triton")

import test_block_sparse_attention as sparse
import test_norm_modulate as norms
import test_qk_norm_rope as ropes
import test_simt_ops as ops
import torch
from helpers import randn
from simt_faults import FAULTS, NUMBERS, Fault, seeded
from torch import Tensor

import hhattn
from hhattn import simt
from hhattn.kernels import block_sparse_attention_tiles as tiles
from hhattn.ops import _triton

pytestmark = pytest.mark.skipif(_triton.interpreted(), reason="the interpreter runs no PTX")
BF16 = torch.bfloat16


def norm() -> None:
    """Three warps a row, channels that don't fill them; x has gaps between tokens, the residual none."""
    args = norms.arguments(tokens=6, channels=700)
    expected, baseline = (norms.eager(**{n: t.to(d) for n, t in args.items()}) for d in (torch.float64, torch.float32))
    ours = args | {"x": ops.strided(args["x"])}
    ops.check(
        *(ops.named("y", "r")(out) for out in (hhattn.norm_modulate(**ours, impl="triton"), expected, baseline)), 2
    )


def norm_backward() -> None:
    """Runs of 64 tokens and one more, of each of two frames."""
    args = norms.arguments(tokens=130, channels=20, rows=2, batch=1)
    args["shift"] = args["shift"][:, :2].contiguous()
    wide = {n: t.double() for n, t in args.items()}
    got = norms.gradients(lambda **a: hhattn.norm_modulate(**a, impl="triton"), args, "layer")
    ops.check(got, norms.gradients(norms.eager, wide, "layer"), norms.gradients(norms.eager, args, "layer"), 3)


def rope() -> None:
    args = ropes.arguments(text=3, dim=16)
    how = {"text_first": True}
    outs = (hhattn.qk_norm_rope(**args, **how, impl="triton"), ropes.eager(**ropes.in_double(args), **how))
    ops.check(*(ops.named("q", "k")(out) for out in (*outs, ropes.eager(**args, **how))), 2)


def _attention(block: tuple[int, int], gradients: bool) -> None:
    """Full and partial blocks, a mask for each head, rows that attend nothing; keys get larger along the sequence, so
    that running maxima move."""
    keep = sparse.random_keep(2, 2, 100, 140, share=0.4)
    keep[:, 0, :, : block[1]] = True
    keep[:, 1, 70:] = False
    q, k, v = (randn(2, n, h, 64, seed=i).to(BF16) for i, (n, h) in enumerate(((100, 2), (140, 1), (140, 1))))
    inputs = {"q": q, "k": k * torch.linspace(0.2, 2, 140)[:, None, None].to(BF16), "v": v}
    mask, seen = hhattn.BlockMask.from_dense(keep, block_size=block), keep.any(-1)

    def ours(**a: Tensor) -> tuple[Tensor, ...]:
        return hhattn.block_sparse_attention(**a, mask=mask, return_lse=True, impl="triton")

    def formula(**a: Tensor) -> tuple[Tensor, ...]:
        return sparse.dense_formula(**a, keep=keep)

    def run(call: Callable[..., tuple[Tensor, ...]], a: dict[str, Tensor]) -> dict[str, Tensor]:
        return ops.with_gradients(call, a, seen) if gradients else ops.named("out", "lse")(call(**a))

    expected, baseline = run(formula, {n: x.double() for n, x in inputs.items()}), run(formula, inputs)
    baseline["lse"] = formula(**{n: x.float() for n, x in inputs.items()})[1]  # as kernels make it, whatever the dtype
    for name, value in run(ours, inputs).items():
        factor = 2 if name in ("out", "lse") else 3
        ops.assert_close_to_fp64(value, expected[name], baseline[name].to(value.dtype), factor, 8, name)


RUNS: dict[str, tuple[int, Callable[[], None]]] = {
    "norm": (80, norm),
    "norm-backward": (80, norm_backward),
    "rope": (80, rope),
    "sparse": (80, lambda: _attention((32, 64), False)),
    "sparse-backward": (80, lambda: _attention((32, 64), True)),
    "sparse-sm90": (90, lambda: _attention((64, 64), False)),
}


def outcome(name: str, fault: Fault | None, monkeypatch: pytest.MonkeyPatch) -> tuple[list[simt.Report], str]:
    """What was reported, and what the accuracy rule says ("" if it holds). Memory that nothing writes holds NaN."""
    arch, run = RUNS[name]
    changed = []

    def rewrite(kernel: str, ptx: str) -> str:
        assert fault is not None
        text = fault.rewrite(kernel, ptx)
        changed.append(text != ptx)
        return text

    if arch == 90:
        monkeypatch.setattr(tiles, "architecture", lambda x: 90)
    wrong = ""
    with simt.emulate(arch, seed=1, rewrite=rewrite if fault and not fault.file else None) as session:
        try:
            run()
        except AssertionError as e:
            wrong = str(e)
    assert session.launches
    assert fault is None or fault.file or any(changed), f"{fault.what}: nothing in the PTX to change"
    return session.reports, wrong


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("name", RUNS)
def test_without_faults_nothing_is_reported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reports, wrong = outcome(name, None, monkeypatch)
    assert not reports, "\n".join(map(str, reports))
    assert not wrong


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.what.replace(" ", "-"))
def test_every_fault_is_caught(fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with seeded(fault, tmp_path):
        reports, wrong = outcome(fault.run, fault, monkeypatch)
    kinds = {r.kind for r in reports}
    if fault.caught == NUMBERS:
        assert wrong, f"results are right; reported: {kinds or 'nothing'}"
    else:
        assert fault.caught in kinds, f"reported: {kinds or 'nothing'}; results: {wrong or 'right'}"


def test_the_table_of_faults_is_documented() -> None:
    text = (Path(__file__).parents[1] / "docs" / "verification.md").read_text()
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \|$", text, re.M)
    documented = {(what, caught.strip("`")) for what, _, caught in rows}
    assert {(f.what, f.caught) for f in FAULTS} <= documented
