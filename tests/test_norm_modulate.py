"""norm_modulate: every implementation against float64, and the reference against PyTorch's own norms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import IMPLS, NATIVE_ISAS
from helpers import DEVICE, assert_close_to_fp64, randn, strided
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import hhattn
from hhattn.reference.norm_modulate import norm_modulate as reference

pytestmark = pytest.mark.any_device

needs_native = pytest.mark.skipif(not NATIVE_ISAS, reason="the native library is not built")
FP32 = torch.float32
ORDER = ("x", "scale", "shift", "weight", "bias", "residual", "gate")


def arguments(
    batch: int = 2, tokens: int = 12, channels: int = 53, rows: int = 3, dtype: torch.dtype = FP32, device: str = DEVICE
) -> dict[str, Tensor]:
    """Every tensor argument, each with a shape of its own."""
    shapes = {
        "x": (batch, tokens, channels),
        "scale": (batch, rows, channels),
        "shift": (1, tokens, channels),
        "weight": (channels,),
        "bias": (channels,),
        "residual": (batch, tokens, channels),
        "gate": (batch, 1, channels),
    }
    return {n: randn(*s, dtype=dtype, seed=i, device=device) for i, (n, s) in enumerate(shapes.items())}


def eager(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    norm: str = "rms",
    eps: float = 1e-6,
) -> Any:
    """What users write without hhattn: PyTorch's own norms, everything in the dtype of x, modulation expanded."""

    def full(m: Tensor) -> Tensor:
        return m.to(x.dtype).repeat_interleave(x.shape[1] // m.shape[1], 1)

    r = x if gate is None else x * full(gate)
    r = r if residual is None else residual.to(x.dtype) + r
    size = x.shape[-1:]
    weight, bias = (None if p is None else p.to(x.dtype) for p in (weight, bias))
    if norm == "layer":
        y = F.layer_norm(r, size, weight, bias, eps)
    else:
        y = F.rms_norm(r, size, weight, eps)
        y = y if bias is None else y + bias
    y = y if scale is None else y * (1 + full(scale))
    y = y if shift is None else y + full(shift)
    return y if residual is None else (y, r.to(residual.dtype))


def as_tuple(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def check(args: dict[str, Tensor], impl: str, norm: str = "rms", eps: float = 1e-6) -> None:
    expected = as_tuple(eager(**{n: t.double() for n, t in args.items()}, norm=norm, eps=eps))
    baseline = as_tuple(eager(**args, norm=norm, eps=eps))
    actual = as_tuple(hhattn.norm_modulate(**args, norm=norm, eps=eps, impl=impl))
    assert len(actual) == len(expected)
    for name, a, e, b in zip(("y", "r"), actual, expected, baseline, strict=False):
        assert_close_to_fp64(a, e, b, name=name)


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("impl", IMPLS)
def test_everything_at_once(impl: str, norm: str, dtype: torch.dtype, poisoned_empty: None) -> None:
    args = arguments(dtype=dtype)
    check(args, impl, norm)
    y, r = hhattn.norm_modulate(**args, norm=norm, impl=impl)
    assert y.dtype == r.dtype == dtype
    assert y.is_contiguous()


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_each_instruction_set(isa: str, norm: str, dtype: torch.dtype) -> None:
    for channels in (1, 7, 16, 31, 64, 100):
        check(arguments(channels=channels, dtype=dtype), "cpp", norm, eps=1e-3)


def test_instruction_sets_convert_every_half(isa: str) -> None:
    """Every 16-bit pattern is read and rounded as PyTorch does it: the gated sum with a zero gate is the residual."""
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(65536, dtype=torch.int32, device=DEVICE).to(torch.int16).view(dtype).view(1, -1, 64)
        zero = torch.zeros(1, 1024, 64, device=DEVICE)
        _, wide = hhattn.norm_modulate(every, residual=zero, impl="cpp")
        torch.testing.assert_close(wide, every.float(), rtol=0, atol=0, equal_nan=True)
        _, back = hhattn.norm_modulate(zero, residual=every, impl="cpp")
        torch.testing.assert_close(back, every, rtol=0, atol=0, equal_nan=True)
        # between two neighbours, on a tie, and just off it
        low = every.float().nan_to_num(0, 0, 0)
        for shift in (0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001):
            values = (low.view(torch.int32) + shift).view(torch.float32)
            _, r = hhattn.norm_modulate(
                values, residual=torch.zeros(1, 1024, 64, dtype=dtype, device=DEVICE), impl="cpp"
            )
            torch.testing.assert_close(r, values.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("names", [(), ("scale",), ("shift",), ("bias",), ("weight", "scale"), ("residual",)])
def test_any_argument_may_be_left_out(impl: str, names: tuple[str, ...]) -> None:
    args = arguments()
    check({n: args[n] for n in ("x", *names)}, impl, "layer")


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("left_out", [(), ("weight", "bias"), ("residual", "gate"), ("weight",)], ids=str)
def test_modulation_of_each_token(isa: str, left_out: tuple[str, ...], norm: str, dtype: torch.dtype) -> None:
    """Where every token has modulation of its own, it is used as it is read."""
    args = arguments(rows=12, dtype=dtype)
    args["gate"] = randn(2, 12, 53, seed=6, dtype=dtype)
    check({n: t for n, t in args.items() if n not in left_out}, "cpp", norm)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", IMPLS)
def test_mixed_dtypes(impl: str, dtype: torch.dtype) -> None:
    """A bf16 branch on an fp32 stream with an fp16 modulation, as under autocast. y has x's dtype, r the residual's."""
    args = arguments(dtype=dtype)
    args |= {"residual": args["residual"].float(), "scale": args["scale"].half(), "gate": args["gate"].float()}
    check(args, impl)
    y, r = hhattn.norm_modulate(**args, impl=impl)
    assert (y.dtype, r.dtype) == (dtype, torch.float32)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_inputs(impl: str, dtype: torch.dtype) -> None:
    args = arguments(dtype=dtype)
    views = {n: strided(t, 1) if t.ndim == 3 else t for n, t in args.items()}
    views["gate"] = args["gate"][:, :, :1].expand_as(args["gate"]).contiguous()
    table = torch.stack((args["scale"], args["shift"][:1, :3].expand(2, -1, -1)), 2)  # [B, F, 2, C], as models hold it
    views["scale"], views["shift"] = table.unbind(2)
    check(views, impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_broadcast_batch(impl: str) -> None:
    args = arguments(batch=3)
    check(args | {"scale": args["scale"][:1], "x": args["x"][:1].expand(3, -1, -1)}, impl)


def test_last_dim_not_contiguous_goes_to_the_reference() -> None:
    x = randn(2, 53, 12).transpose(1, 2)
    torch.testing.assert_close(hhattn.norm_modulate(x), hhattn.norm_modulate(x.contiguous(), impl="reference"))
    if NATIVE_ISAS:
        with pytest.raises(RuntimeError, match="the last dim of x is not contiguous"):
            hhattn.norm_modulate(x, impl="cpp")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (1, 1, 8), (1, 1, 1)])
def test_empty_and_single(impl: str, shape: tuple[int, int, int]) -> None:
    x = randn(*shape)
    y, r = hhattn.norm_modulate(x, randn(1, 1, shape[2]), residual=x, impl=impl)
    assert y.shape == r.shape == shape
    torch.testing.assert_close(y, reference(x, randn(1, 1, shape[2]), None, None, None, x, None, "rms", 1e-6)[0])


@pytest.mark.parametrize("impl", IMPLS)
def test_no_tokens_in_no_frames(impl: str) -> None:
    """S = F = 0: results and gradients are as empty as what they belong to."""
    args = arguments(tokens=0, rows=0)
    leaves = {n: t.requires_grad_() for n, t in args.items()}
    y, r = hhattn.norm_modulate(**leaves, impl=impl)
    assert y.shape == r.shape == (2, 0, 53)
    grads = torch.autograd.grad(y.sum() + r.sum(), list(leaves.values()))
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        torch.testing.assert_close(grad, torch.zeros_like(leaf), msg=name)
    meta = arguments(tokens=0, rows=0, device="meta")
    assert hhattn.norm_modulate(**meta, impl="reference")[0].shape == (2, 0, 53)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_bad_row_stays_alone(impl: str) -> None:
    x = randn(1, 5, 40)
    x[0, 1, 3], x[0, 2, 4] = float("nan"), float("inf")
    y = hhattn.norm_modulate(x, impl=impl)
    good = [0, 3, 4]
    torch.testing.assert_close(y[:, good], eager(x[:, good]))
    assert y[0, 1].isnan().all()


@pytest.mark.parametrize("impl", IMPLS)
@given(
    groups=st.integers(1, 4),
    each=st.integers(1, 5),
    channels=st.integers(1, 70),
    norm=st.sampled_from(["rms", "layer"]),
)
def test_rows_serve_their_group(impl: str, groups: int, each: int, channels: int, norm: str) -> None:
    """[B, F, C] is the same as its rows repeated for each token."""
    x, scale, shift = (randn(2, n, channels, seed=i) for i, n in enumerate((groups * each, groups, groups)))
    y = hhattn.norm_modulate(x, scale, shift, norm=norm, impl=impl)
    full = (m.repeat_interleave(each, 1) for m in (scale, shift))
    torch.testing.assert_close(y, hhattn.norm_modulate(x, *full, norm=norm, impl=impl))


def gradients(function: Any, args: dict[str, Tensor], norm: str) -> dict[str, Tensor]:
    leaves = {n: t.detach().clone().requires_grad_() for n, t in args.items()}
    out = as_tuple(function(**leaves, norm=norm))
    sum((o * randn(*o.shape, seed=9).to(o)).sum() for o in out).backward()
    return {n: t.grad for n, t in leaves.items()}


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("impl", IMPLS)
def test_gradients(impl: str, norm: str, dtype: torch.dtype) -> None:
    args = arguments(dtype=dtype)
    expected = gradients(eager, {n: t.double() for n, t in args.items()}, norm)
    baseline = gradients(eager, args, norm)
    actual = gradients(lambda **a: hhattn.norm_modulate(**a, impl=impl), args, norm)
    for name in args:
        assert actual[name].dtype == dtype
        assert_close_to_fp64(actual[name], expected[name], baseline[name], factor=3, name=f"gradient of {name}")


@pytest.mark.parametrize("names", [("x",), ("x", "scale", "weight"), ("x", "residual")])
@needs_native
def test_native_gradients_with_arguments_left_out(names: tuple[str, ...]) -> None:
    args = {n: arguments()[n] for n in names}
    expected = gradients(lambda **a: hhattn.norm_modulate(**a, impl="reference"), args, "rms")
    actual = gradients(lambda **a: hhattn.norm_modulate(**a, impl="cpp"), args, "rms")
    for name in names:
        torch.testing.assert_close(actual[name], expected[name])


def test_reference_gradcheck() -> None:
    args = [t.double().requires_grad_() for t in arguments(1, 4, 3, 2).values()]
    for norm in ("rms", "layer"):
        assert torch.autograd.gradcheck(lambda *a, norm=norm: reference(*a, norm, 1e-2), args)


@needs_native
def test_forward_mode_gives_the_tangent() -> None:
    x, scale = randn(1, 6, 8, dtype=FP32), randn(1, 2, 8, dtype=FP32, seed=1)

    def run(x: Tensor, scale: Tensor) -> Tensor:
        return hhattn.norm_modulate(x, scale)

    primal, tangent = torch.func.jvp(run, (x, scale), (x.cos(), scale.sin()))
    h = 1e-3
    difference = run(x + h * x.cos(), scale + h * scale.sin()) - run(x - h * x.cos(), scale - h * scale.sin())
    torch.testing.assert_close(primal, run(x, scale))
    torch.testing.assert_close(tangent, difference / (2 * h), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("impl", IMPLS)
def test_second_derivatives(impl: str) -> None:
    """The gradient is made of differentiable steps, so gradient penalties work."""
    grads = []
    for chosen in (impl, "reference"):
        x = randn(1, 3, 8).requires_grad_()
        (first,) = torch.autograd.grad(hhattn.norm_modulate(x, impl=chosen).pow(3).sum(), x, create_graph=True)
        grads.append(torch.autograd.grad(first.square().sum(), x)[0])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", IMPLS)
def test_compiled_without_a_break(impl: str) -> None:
    args = arguments(tokens=6)

    def step(**a: Tensor) -> tuple[Tensor, Tensor]:
        return hhattn.norm_modulate(**a, norm="layer", impl=impl)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (6, 9):
        args = arguments(tokens=tokens)
        torch.testing.assert_close(compiled(**args), step(**args))
    expected = gradients(lambda norm, **a: step(**a), args, "")
    actual = gradients(lambda norm, **a: compiled(**a), args, "")
    torch.testing.assert_close(actual, expected)


@needs_native
def test_opcheck() -> None:
    args = {n: t.requires_grad_() for n, t in arguments(tokens=6).items()}
    op = torch.ops.hhattn.norm_modulate.default
    torch.library.opcheck(op, (*args.values(), True, 1e-6))
    torch.library.opcheck(op, (args["x"], None, None, None, None, None, None, False, 1e-6))


@needs_native
def test_native_op_refuses_what_would_read_out_of_bounds() -> None:
    a = arguments()
    rest = (None, None, None, None, None, False, 1e-6)
    for scale in (a["scale"][..., :5], a["scale"][:, :, None], torch.cat((a["scale"],) * 2), a["x"][:, :5]):
        with pytest.raises(RuntimeError):
            torch.ops.hhattn.norm_modulate(a["x"], scale, *rest)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_changes_nothing(impl: str) -> None:
    args = arguments()
    expected = hhattn.norm_modulate(**args, impl=impl)
    with torch.autocast(DEVICE, torch.bfloat16):
        torch.testing.assert_close(hhattn.norm_modulate(**args, impl=impl), expected, rtol=0, atol=0)


def test_meta_and_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    y, r = hhattn.norm_modulate(**arguments(device="meta"))
    assert y.device.type == r.device.type == "meta"
    with FakeTensorMode() as mode:
        fake = {n: mode.from_tensor(t) for n, t in arguments().items()}
        assert hhattn.norm_modulate(**fake)[0].shape == (2, 12, 53)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
    (
        {"x": torch.zeros(2, 12, 53, dtype=torch.float64)},
        TypeError,
        "x must be float32, float16 or bfloat16, got float64",
    ),
    ({"x": torch.zeros(12, 53)}, ValueError, r"x must have 3 dimensions, got shape \(12, 53\)"),
    ({"scale": torch.zeros(2, 5, 53)}, ValueError, r"scale must have shape .* F divides S = 12, got \(2, 5, 53\)"),
    ({"shift": torch.zeros(3, 1, 53)}, ValueError, "shift must have shape"),
    ({"gate": torch.zeros(2, 1, 52)}, ValueError, "gate must have shape"),
    ({"residual": None}, ValueError, "gate needs residual"),
    ({"residual": torch.zeros(2, 12, 1)}, ValueError, "residual must have shape"),
    ({"weight": torch.zeros(52)}, ValueError, r"weight must have shape \[C\] = \(53,\), got \(52,\)"),
    ({"bias": torch.zeros(1, 53)}, ValueError, "bias must have 1 dimensions"),
    ({"scale": torch.zeros(2, 1, 53, device="meta")}, ValueError, "scale must be on the device of x, cpu, got meta"),
    ({"norm": "batch"}, ValueError, "norm='batch' is not accepted; choose one of 'rms', 'layer'"),
    ({"eps": -1.0}, ValueError, "eps=-1.0 must not be negative"),
    ({"eps": "small"}, TypeError, "eps must be a number, got str"),
    ({"impl": "fast"}, ValueError, "impl='fast'"),
    ({"impl": "cuda"}, RuntimeError, "norm_modulate.*cuda"),
]


@pytest.mark.cpu_only("arguments are refused before their device matters")
@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m[:24] for _, _, m in BAD])
def test_refusals(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        hhattn.norm_modulate(**{**arguments(), **change})
