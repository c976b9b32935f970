"""Every op's Triton kernels, compiled for a GPU and executed thread by thread on a CPU: nothing reported, the same
bits whatever the order of warps, and within the accuracy rule of float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import linear_oracle as linear
import pytest
import test_block_sparse_attention as sparse
import test_norm_modulate as norms
import test_qk_norm_rope as ropes
import torch
from helpers import assert_close_to_fp64, randn, strided
from torch import Tensor

pytest.importorskip("triton")

import hhattn
from hhattn import simt
from hhattn.kernels import block_sparse_attention_tiles as tiles
from hhattn.ops import _triton

pytestmark = pytest.mark.skipif(_triton.interpreted(), reason="the interpreter runs no PTX")
SEEDS = (0, 1)
ARCHS = (80, 90)  # of forwards; gradients on the first
Results = dict[str, Tensor]


def emulated(call: Callable[[], Results], arch: int = 80) -> Results:
    """What ``call`` returns on the emulator, the same bits for every seed, with not one report."""
    results = []
    for seed in SEEDS:
        with simt.emulate(arch, seed) as session:
            results.append(call())
        assert session.launches, "no kernel was launched"
        assert not session.reports, "\n".join(map(str, session.reports))
    first, *others = results
    for other in others:
        for name, value in first.items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=0, equal_nan=True, msg=f"{name}: seeds differ")
    return first


def check(actual: Results, expected: Mapping[str, Tensor], baseline: Mapping[str, Tensor], factor: float) -> None:
    for name, value in expected.items():
        assert_close_to_fp64(actual[name], value, baseline[name], factor=factor, name=name)


def named(*names: str) -> Callable[[Any], Results]:
    return lambda out: dict(zip(names, out if isinstance(out, tuple) else (out,), strict=False))


def on_strides(args: dict[str, Any]) -> dict[str, Any]:
    return {n: strided(t, 1) if isinstance(t, Tensor) and t.ndim > 2 else t for n, t in args.items()}


# ---- norm_modulate: tokens of a run and a bit, channels no power of two, rows for a token, for a frame, for all

NORM_CASES = {
    "all-arguments": ({"tokens": 12, "channels": 53}, "rms"),
    "long-runs": ({"tokens": 130, "channels": 40, "rows": 2, "batch": 1}, "layer"),
    "one-token": ({"tokens": 1, "channels": 112, "rows": 1}, "layer"),
}


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("case", NORM_CASES)
def test_norm_modulate(case: str, dtype: torch.dtype) -> None:
    shape, norm = NORM_CASES[case]
    args = norms.arguments(**shape, dtype=dtype)
    wide = {n: t.double() for n, t in args.items()}
    outputs = named("y", "r")
    for arch in ARCHS:
        actual = emulated(lambda: outputs(hhattn.norm_modulate(**on_strides(args), norm=norm, impl="triton")), arch)
        expected, baseline = (outputs(norms.eager(**a, norm=norm)) for a in (wide, args))
        check(actual, expected, baseline, 2)
    gradients = norms.gradients
    got = emulated(lambda: gradients(lambda **a: hhattn.norm_modulate(**a, impl="triton"), args, norm))
    eager = norms.eager
    check(got, gradients(eager, wide, norm), gradients(eager, args, norm), 3)


# ---- qk_norm_rope: k has fewer heads, text before and after, heads of 40 and 112 dims, norms over a head and over all

ROPE_CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "head": ({"dim": 40, "text": 3}, {"norm": "rms"}),
    "across": ({"dim": 112, "heads": 2, "kv_heads": 1, "across_heads": True}, {"norm": "rms", "rotate": "half"}),
    "layer": ({"video": 35, "dim": 10, "text": 2}, {"norm": "layer", "text_first": True}),
    "one-token": ({"batch": 1, "video": 1, "dim": 10}, {"norm": "rms"}),
}


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("case", ROPE_CASES)
def test_qk_norm_rope(case: str, dtype: torch.dtype) -> None:
    shape, how = ROPE_CASES[case]
    args = ropes.arguments(**shape, dtype=dtype)
    wide = ropes.in_double(args)
    outputs = named("q", "k")
    for arch in ARCHS:
        actual = emulated(lambda: outputs(hhattn.qk_norm_rope(**on_strides(args), **how, impl="triton")), arch)
        expected, baseline = (outputs(ropes.eager(**a, **how)) for a in (wide, args))
        check(actual, expected, baseline, 2)
    gradients, eager = ropes.gradients, ropes.eager
    got = emulated(lambda: gradients(lambda **a: hhattn.qk_norm_rope(**a, impl="triton"), args, **how))
    check(got, gradients(eager, wide, **how), gradients(eager, args, **how), 3)


# ---- block_sparse_attention: blocks that are full, partial and cut by the edge, a mask for each batch entry and head,
# queries that attend nothing, keys that serve two heads, values of another width, every input strided

SPARSE_CASES: dict[str, dict[str, Any]] = {
    "odd-blocks": {"block": (24, 40), "tokens": (50, 47), "d": 40, "dv": 24},
    "wide-heads": {"block": (32, 64), "tokens": (70, 130), "d": 112, "dv": 112},
    "one-token": {"block": (16, 32), "tokens": (1, 50), "d": 16, "dv": 16},
}
SLOW = {"wide-heads", "listed-chunks"}


def slow_if_long(cases: Mapping[str, Any]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in cases]


def sparse_inputs(case: Mapping[str, Any], dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    (sq, sk), (bq, bk) = case["tokens"], case["block"]
    keep = sparse.random_keep(2, 2, sq, sk, share=0.4)
    keep[:, :, :bq, :bk] = True
    keep[:, 1, (sq + 1) // 2 :] = False
    shapes = {"q": (2, sq, 2, case["d"]), "k": (2, sk, 1, case["d"]), "v": (2, sk, 1, case["dv"])}
    inputs = {n: strided(randn(*shape, dtype=dtype, seed=i)) for i, (n, shape) in enumerate(shapes.items())}
    return keep, inputs


def with_gradients(call: Callable[..., tuple[Tensor, ...]], inputs: Results, seen: Tensor) -> Results:
    """out, lse and the gradients of a sum of both, over rows that attend something."""
    leaves = {n: x.detach().requires_grad_() for n, x in inputs.items()}
    out, lse = call(**leaves)
    loss = (out * randn(*out.shape, seed=9).to(out)).sum() + (lse * randn(*lse.shape, seed=10).to(lse))[seen].sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    results = {f"d{n}": g.nan_to_num() for n, g in zip(leaves, grads, strict=True)}
    return {"out": out.detach(), "lse": lse.detach(), **results}


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("case", slow_if_long(SPARSE_CASES))
def test_block_sparse_attention(case: str, dtype: torch.dtype) -> None:
    keep, inputs = sparse_inputs(SPARSE_CASES[case], dtype)
    seen = keep.any(-1)
    mask = hhattn.BlockMask.from_dense(keep, block_size=SPARSE_CASES[case]["block"])

    def ours(**leaves: Tensor) -> tuple[Tensor, ...]:
        return hhattn.block_sparse_attention(**leaves, mask=mask, return_lse=True, impl="triton")

    def formula(**leaves: Tensor) -> tuple[Tensor, ...]:
        out, lse = sparse.dense_formula(**leaves, keep=keep)
        return out, lse.to(torch.float64 if leaves["q"].dtype == torch.float64 else torch.float32)

    expected = with_gradients(formula, {n: x.double() for n, x in inputs.items()}, seen)
    baseline = with_gradients(formula, inputs, seen)
    baseline["lse"] = formula(**{n: x.float() for n, x in inputs.items()})[1]  # as kernels make it, whatever the dtype
    actual = emulated(lambda: with_gradients(ours, inputs, seen))
    for name, value in expected.items():
        factor = 2 if name in ("out", "lse") else 3
        assert_close_to_fp64(actual[name], value, baseline[name], factor=factor, ulps=8, name=name)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("case", slow_if_long(SPARSE_CASES))
def test_block_sparse_attention_on_sm90(case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward with the tiles of a Hopper GPU, whose 64 rows and more go through wgmma in 16 bits."""
    monkeypatch.setattr(tiles, "architecture", lambda x: 90)
    keep, inputs = sparse_inputs(SPARSE_CASES[case] | {"block": (64, 64)}, dtype)
    mask = hhattn.BlockMask.from_dense(keep, block_size=(64, 64))
    outputs = named("out", "lse")
    actual = emulated(
        lambda: outputs(hhattn.block_sparse_attention(**inputs, mask=mask, return_lse=True, impl="triton")), 90
    )
    expected = outputs(sparse.dense_formula(**{n: x.double() for n, x in inputs.items()}, keep=keep))
    baseline = outputs(sparse.dense_formula(**inputs, keep=keep))
    baseline["lse"] = sparse.dense_formula(**{n: x.float() for n, x in inputs.items()}, keep=keep)[1]
    for name, value in baseline.items():
        assert_close_to_fp64(actual[name], expected[name], value.to(actual[name].dtype), ulps=8, name=name)


# ---- block_linear_attention: chunks of several pieces, the last short, heads that share keys, every option, state in
# and out, every input strided

LINEAR_CASES: dict[str, tuple[tuple[int, ...], Any, set[str]]] = {
    "every-option": ((2, 50, 2, 1, 40, 24), 37, linear.EVERY),
    "listed-chunks": ((1, 66, 1, 1, 16, 112), [1, 32, 33], {"rope", "decay"}),
    "one-token": ((1, 1, 1, 1, 16, 16), None, linear.EVERY),
}


@pytest.fixture
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 16 tokens, so that chunks of some dozens have several."""
    monkeypatch.setattr(_triton.kernels("block_linear_attention"), "PIECE", 16)


def linear_call(case: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any], list[int]]:
    """q, k, v, the options, and the chunks' lengths."""
    (batch, tokens, heads, kv_heads, dim, dim_v), chunk_lens, names = LINEAR_CASES[case]
    lens = linear.lens_of(chunk_lens, tokens)
    made = linear.options(batch, tokens, heads, dim, dim_v, len(lens), names)
    given = linear.inputs(batch, tokens, heads, kv_heads, dim, dim_v)
    return dict(zip("qkv", (x.to(dtype) for x in given), strict=True)), made, lens


@pytest.mark.usefixtures("poisoned_empty", "short_pieces")
@pytest.mark.parametrize("case", slow_if_long(LINEAR_CASES))
def test_block_linear_attention(case: str, dtype: torch.dtype) -> None:
    """Outputs, states and the gradients of all that has one."""
    sizes, chunk_lens, names = LINEAR_CASES[case]
    for seed in SEEDS:
        with simt.emulate(80, seed) as session:
            linear.compare("triton", dtype, sizes, chunk_lens, names, eps=1e-3)
        assert session.launches, "no kernel was launched"
        assert not session.reports, "\n".join(map(str, session.reports))


@pytest.mark.usefixtures("poisoned_empty", "short_pieces")
@pytest.mark.parametrize("case", slow_if_long(LINEAR_CASES))
def test_block_linear_attention_on_sm90(case: str, dtype: torch.dtype) -> None:
    tensors, made, lens = linear_call(case, dtype)
    extra = {n: linear.to(x, torch.float32) for n, x in made.items()}
    _, chunk_lens, _ = LINEAR_CASES[case]

    def call() -> Results:
        args = {**on_strides(tensors), **extra, "chunk_lens": chunk_lens, "eps": 1e-3, "impl": "triton"}
        out, (kv, k_sum) = hhattn.block_linear_attention(**args, output_final_state=True)
        return {"out": out, "kv": kv, "k_sum": k_sum}

    def formula(up: torch.dtype) -> Results:
        out, kv, k_sum = linear.oracle(
            *(x.to(up) for x in tensors.values()), lens, eps=1e-3, **{n: linear.to(x, up) for n, x in made.items()}
        )
        return {"out": out if up == torch.float64 else out.to(dtype), "kv": kv, "k_sum": k_sum}

    actual, expected, baseline = emulated(call, 90), formula(torch.float64), formula(torch.float32)
    for name, value in expected.items():
        assert_close_to_fp64(actual[name], value, baseline[name], ulps=8, name=name)


@pytest.mark.usefixtures("poisoned_empty", "short_pieces")
def test_linear_gradients_are_the_same_bits_in_any_order() -> None:
    tensors, made, _ = linear_call("every-option", torch.bfloat16)
    extra = {n: linear.to(x, torch.float32) for n, x in made.items()}

    def call() -> Results:
        leaves = {n: x.detach().clone().requires_grad_() for n, x in tensors.items()}
        out = hhattn.block_linear_attention(**leaves, **extra, chunk_lens=37, eps=1e-3, impl="triton")
        return dict(zip(leaves, torch.autograd.grad(out.float().square().sum(), list(leaves.values())), strict=True))

    emulated(call)
