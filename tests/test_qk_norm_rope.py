"""qk_norm_rope: every implementation against float64, the reference against PyTorch's norms and complex rotation."""

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
from hhattn.reference.qk_norm_rope import qk_norm_rope as reference

pytestmark = pytest.mark.any_device

needs_native = pytest.mark.skipif(not NATIVE_ISAS, reason="the native library is not built")
FP32 = torch.float32
TENSORS = ("q", "k", "cos", "sin", "q_weight", "k_weight", "q_bias", "k_bias")


def arguments(
    batch: int = 2,
    video: int = 11,
    text: int = 0,
    heads: int = 6,
    kv_heads: int = 3,
    dim: int = 10,
    dtype: torch.dtype = FP32,
    device: str = DEVICE,
    across_heads: bool = False,
    affine: bool = True,
) -> dict[str, Any]:
    q_size, k_size = (heads * dim, kv_heads * dim) if across_heads else (dim, dim)
    shapes: dict[str, tuple[int, ...]] = {
        "q": (batch, video + text, heads, dim),
        "k": (batch, video + text, kv_heads, dim),
        "q_weight": (q_size,),
        "k_weight": (k_size,),
        "q_bias": (q_size,),
        "k_bias": (k_size,),
    }
    names = shapes if affine else ("q", "k")
    out: dict[str, Any] = {n: randn(*shapes[n], dtype=dtype, seed=i, device=device) for i, n in enumerate(names)}
    # one angle a pair would do; independent numbers at both places prove that each is used where it belongs
    out["cos"], out["sin"] = (randn(video, dim, dtype=dtype, seed=s, device=device) for s in (11, 12))
    return out | {"across_heads": across_heads, "text_len": text}


def in_double(args: dict[str, Any]) -> dict[str, Any]:
    return {n: a.double() if isinstance(a, Tensor) else a for n, a in args.items()}


def eager(
    q: Tensor,
    k: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    norm: str | None = "rms",
    across_heads: bool = False,
    rotate: str = "interleaved",
    eps: float = 1e-6,
    text_len: int = 0,
    text_first: bool = False,
    layout: hhattn.VideoLayout | None = None,
) -> tuple[Tensor, Tensor]:
    """What users write without hhattn: PyTorch's norms, the rotation pair by pair, everything in the dtype of q."""

    def one(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        y = x.flatten(2) if across_heads else x
        weight, bias = (None if p is None else p.to(x.dtype) for p in (weight, bias))
        if norm == "layer":
            y = F.layer_norm(y, y.shape[-1:], weight, bias, eps)
        elif norm == "rms":
            y = F.rms_norm(y, y.shape[-1:], weight, eps)
            y = y if bias is None else y + bias
        y = y.reshape(x.shape)
        if cos is not None and sin is not None:
            c, s = (t.to(x.dtype) if t.ndim == 4 else t.to(x.dtype)[None, :, None] for t in (cos, sin))
            half = x.shape[-1] // 2
            pair = (
                [slice(0, None, 2), slice(1, None, 2)] if rotate == "interleaved" else [slice(half), slice(half, None)]
            )
            tokens = slice(text_len, None) if text_first else slice(0, x.shape[1] - text_len)
            a, b = (y[:, tokens, :, p] for p in pair)
            turned = y.clone()
            turned[:, tokens, :, pair[0]] = a * c[..., pair[0]] - b * s[..., pair[0]]
            turned[:, tokens, :, pair[1]] = b * c[..., pair[1]] + a * s[..., pair[1]]
            y = turned
        return y if layout is None else layout.to_tiles(y)

    return one(q, q_weight, q_bias), one(k, k_weight, k_bias)


def check(args: dict[str, Any], impl: str | None, **how: Any) -> None:
    expected, baseline = eager(**in_double(args), **how), eager(**args, **how)
    actual = hhattn.qk_norm_rope(**args, **how, impl=impl)
    for name, x, a, e, b in zip("qk", (args["q"], args["k"]), actual, expected, baseline, strict=True):
        assert a.dtype == x.dtype
        assert a.is_contiguous()
        assert_close_to_fp64(a, e, b, name=name)


@pytest.mark.parametrize("across_heads", [False, True])
@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("impl", IMPLS)
def test_norms(impl: str, norm: str, across_heads: bool, dtype: torch.dtype, poisoned_empty: None) -> None:
    check(arguments(dtype=dtype, across_heads=across_heads), impl, norm=norm)


@pytest.mark.parametrize("rotate", ["interleaved", "half"])
@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_rotations_and_text(impl: str, rotate: str, text_first: bool, dtype: torch.dtype) -> None:
    check(arguments(dtype=dtype, text=4), impl, rotate=rotate, text_first=text_first)
    check(arguments(dtype=dtype, affine=False), impl, norm=None, rotate=rotate)


@pytest.mark.parametrize("rotate", ["interleaved", "half"])
def test_each_instruction_set(isa: str, rotate: str, dtype: torch.dtype) -> None:
    for dim in (2, 6, 40, 64, 112):
        check(arguments(dim=dim, text=2, dtype=dtype), "cpp", rotate=rotate)
        check(
            arguments(dim=dim, heads=4, kv_heads=1, dtype=dtype, across_heads=True), "cpp", rotate=rotate, norm="layer"
        )


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rotation_takes_an_odd_dim(impl: str) -> None:
    args = arguments(dim=7)
    check(args | {"cos": None, "sin": None}, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(1, 11, 1, 10), (2, 11, 1, 10), (2, 11, 6, 10), (1, 11, 6, 10)])
def test_tables_by_batch_and_head(impl: str, shape: tuple[int, ...]) -> None:
    args = arguments(kv_heads=6)
    check(args | {"cos": randn(*shape, seed=3), "sin": randn(*shape, seed=4)}, impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_inputs_of_a_fused_projection(impl: str, dtype: torch.dtype) -> None:
    args = arguments(dtype=dtype, kv_heads=6)
    fused = torch.stack((args["q"], args["k"], args["k"]), 2)  # [B, S, 3, H, D]
    args["q"], args["k"] = fused.unbind(2)[:2]
    check(args, impl)
    args["q"], args["k"] = (strided(x, 2).transpose(1, 2).contiguous().transpose(1, 2) for x in (args["q"], args["k"]))
    check(args | {"cos": strided(args["cos"], 0), "sin": args["sin"].expand_as(args["sin"])}, impl)


@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_tile_order(impl: str, text_first: bool) -> None:
    layout = hhattn.VideoLayout(3, 5, 4, tile=(2, 2, 3), text_len=7, text_first=text_first)
    args = arguments(video=60, text=7)
    plain = hhattn.qk_norm_rope(**args, text_first=text_first, impl=impl)
    tiled = hhattn.qk_norm_rope(**args, text_first=text_first, layout=layout, impl=impl)
    for a, b in zip(tiled, plain, strict=True):
        torch.testing.assert_close(a, layout.to_tiles(b), rtol=0, atol=0)
    inferred = hhattn.qk_norm_rope(**args | {"text_len": 0}, layout=layout, impl=impl)
    torch.testing.assert_close(inferred, tiled, rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [{"batch": 0}, {"video": 0}, {"video": 0, "text": 3}, {"video": 1, "batch": 1}])
def test_empty_and_single(impl: str, shape: dict[str, int]) -> None:
    check(arguments(**shape), impl)


def test_reference_is_a_complex_product() -> None:
    """The rotation by independent means: neighbours as complex numbers, multiplied by e^(i·angle)."""
    q, k = randn(1, 24, 2, 12), randn(1, 24, 2, 12)
    cos, sin = hhattn.rope_3d((2, 3, 4), 12, device=DEVICE)
    angle = torch.complex(cos[:, ::2], sin[:, ::2])[None, :, None]
    for a, b in zip(hhattn.qk_norm_rope(q, k, cos, sin, norm=None, impl="reference"), (q, k), strict=True):
        turned = torch.view_as_complex(b.unflatten(-1, (-1, 2))) * angle
        torch.testing.assert_close(a, torch.view_as_real(turned).flatten(-2))


@pytest.mark.parametrize("rotate", ["interleaved", "half"])
@pytest.mark.parametrize("impl", IMPLS)
@given(shift=st.integers(-50, 50), dim=st.integers(3, 30))
def test_scores_depend_on_distance_alone(impl: str, rotate: str, shift: int, dim: int) -> None:
    """Moving every token by the same number of frames changes no score."""
    q, k = randn(1, 12, 1, 2 * dim, seed=1), randn(1, 12, 1, 2 * dim, seed=2)
    scores = []
    for offset in ((0, 0, 0), (shift, 0.5, -shift)):
        tables = hhattn.rope_3d((3, 2, 2), 2 * dim, offset=offset, rotate=rotate, device=DEVICE)
        a, b = hhattn.qk_norm_rope(q, k, *tables, rotate=rotate, impl=impl)
        scores.append(torch.einsum("bshd,bthd->bhst", a, b))
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-4)


def gradients(function: Any, args: dict[str, Any], **how: Any) -> dict[str, Tensor]:
    leaves = {n: a.detach().clone().requires_grad_() if isinstance(a, Tensor) else a for n, a in args.items()}
    out = function(**leaves, **how)
    sum((o * randn(*o.shape, seed=9).to(o)).sum() for o in out).backward()
    return {n: a.grad for n, a in leaves.items() if isinstance(a, Tensor)}


@pytest.mark.parametrize(
    "how",
    [
        {"norm": "rms", "text_first": True},
        {"norm": "layer", "rotate": "half"},
        {"norm": "layer", "layout": hhattn.VideoLayout(1, 11, 1, tile=(1, 2, 1), text_len=3)},
    ],
    ids=["rms", "layer-half", "tiles"],
)
@pytest.mark.parametrize("across_heads", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_gradients(impl: str, how: dict[str, Any], across_heads: bool, dtype: torch.dtype) -> None:
    args = arguments(dtype=dtype, text=3, across_heads=across_heads)
    expected, baseline = gradients(eager, in_double(args), **how), gradients(eager, args, **how)
    actual = gradients(lambda **a: hhattn.qk_norm_rope(**a, impl=impl), args, **how)
    for name in TENSORS:
        assert actual[name].dtype == dtype
        assert_close_to_fp64(actual[name], expected[name], baseline[name], factor=3, name=f"gradient of {name}")


@needs_native
def test_native_gradients_without_a_norm_or_a_rotation() -> None:
    for change in ({"norm": None}, {"cos": None, "sin": None}):
        args = arguments(affine=False) | change
        expected = gradients(lambda args=args, **a: hhattn.qk_norm_rope(**a, impl="reference"), args)
        actual = gradients(lambda args=args, **a: hhattn.qk_norm_rope(**a, impl="cpp"), args)
        torch.testing.assert_close(actual, expected)


def test_reference_gradcheck() -> None:
    args = arguments(1, 3, 1, heads=2, kv_heads=1, dim=4)
    order = torch.tensor([2, 0, 3, 1], device=DEVICE)
    tensors = [args[n].double() if n[0] in "qk" else args[n].double()[None, :, None] for n in TENSORS]
    leaves = [t.requires_grad_() for t in tensors]
    for norm in ("rms", "layer"):
        how = (norm, False, "interleaved", 1e-2, 1, True, order)
        assert torch.autograd.gradcheck(lambda *a, how=how: reference(*a, *how), leaves)


def test_forward_mode_gives_the_tangent() -> None:
    args = arguments(batch=1, heads=2, kv_heads=2)
    q = args.pop("q")

    def run(q: Tensor) -> Tensor:
        return hhattn.qk_norm_rope(q, **args)[0]

    tangent = torch.func.jvp(run, (q,), (q.cos(),))[1]
    h = 1e-3
    difference = (run(q + h * q.cos()) - run(q - h * q.cos())) / (2 * h)
    torch.testing.assert_close(tangent, difference, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("impl", IMPLS)
def test_compiled_without_a_break(impl: str) -> None:
    layout = hhattn.VideoLayout(1, 11, 1, tile=(1, 2, 1), text_len=3)

    def step(**a: Any) -> tuple[Tensor, Tensor]:
        return hhattn.qk_norm_rope(**a, layout=layout, impl=impl)

    args = arguments(text=3)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**args), step(**args))
    torch.testing.assert_close(gradients(compiled, args), gradients(step, args))


@needs_native
def test_opcheck() -> None:
    args = arguments(text=3)
    cos, sin = (args[n][None, :, None].requires_grad_() for n in ("cos", "sin"))
    q, k, *affine = (args[n].requires_grad_() for n in TENSORS if n not in ("cos", "sin"))
    op = torch.ops.hhattn.qk_norm_rope.default
    torch.library.opcheck(op, (q, k, cos, sin, *affine, 2, False, True, 1e-6, 3, torch.randperm(14, device=DEVICE)))
    torch.library.opcheck(op, (q, k, None, None, None, None, None, None, 0, False, True, 1e-6, 0, None))


@needs_native
def test_native_op_refuses_what_would_read_out_of_bounds() -> None:
    args = arguments()
    q, k, cos = args["q"], args["k"], args["cos"][None, :, None]
    none = (None,) * 4
    op = torch.ops.hhattn.qk_norm_rope
    for call in (
        (q, k, cos, cos[..., :4], *none, 1, False, True, 1e-6, 0, None),
        (q, k, cos, cos, *none, 1, False, True, 1e-6, 1, None),
        (q, k[:, :3], None, None, *none, 1, False, True, 1e-6, 0, None),
        (q, k, None, None, *none, 1, False, True, 1e-6, 0, torch.arange(3, device=DEVICE)),
        (q, k, None, None, cos[0, 0, 0, :3], None, None, None, 1, False, True, 1e-6, 0, None),
    ):
        with pytest.raises(RuntimeError):
            op(*call)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_changes_nothing(impl: str) -> None:
    args = arguments()
    expected = hhattn.qk_norm_rope(**args, impl=impl)
    with torch.autocast(DEVICE, torch.bfloat16):
        torch.testing.assert_close(hhattn.qk_norm_rope(**args, impl=impl), expected, rtol=0, atol=0)


def test_meta_tensors() -> None:
    q, k = hhattn.qk_norm_rope(**arguments(device="meta"))
    assert (q.shape, k.shape) == ((2, 11, 6, 10), (2, 11, 3, 10))


LAYOUT = hhattn.VideoLayout(1, 11, 1, tile=(1, 2, 1), text_len=3)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"q": torch.zeros(2, 11, 60)}, ValueError, "q must have 4 dimensions"),
    ({"q": torch.zeros(2, 11, 6, 10).double()}, TypeError, "q must be float32, float16 or bfloat16"),
    ({"k": torch.zeros(2, 12, 3, 10)}, ValueError, r"k must have shape \[B, S, H_kv, D\]"),
    ({"k": torch.zeros(2, 11, 4, 10)}, ValueError, "k has 4 heads; they must divide q's H = 6"),
    ({"cos": torch.zeros(12, 10)}, ValueError, r"cos must have shape \[S_video, D\] = \(11, 10\)"),
    ({"cos": torch.zeros(1, 11, 6, 10)}, ValueError, "cos differs by head, which needs H_kv = H"),
    ({"sin": None}, ValueError, "cos and sin must both be given"),
    ({"sin": torch.zeros(2, 11, 1, 10)}, ValueError, "cos and sin must have one shape"),
    ({"q_weight": torch.zeros(60)}, ValueError, r"q_weight must have shape \[D\] = \(10,\)"),
    ({"across_heads": True}, ValueError, r"q_weight must have shape \[H·D\] = \(60,\)"),
    ({"norm": None}, ValueError, "q_weight needs a norm"),
    ({"norm": "batch"}, ValueError, "norm='batch' is not accepted; choose one of None, 'rms', 'layer'"),
    ({"rotate": "whole"}, ValueError, "rotate='whole' is not accepted; choose one of 'interleaved', 'half'"),
    ({"text_len": 12}, ValueError, "text_len=12 must be between 0 and S = 11"),
    ({"layout": LAYOUT}, ValueError, "layout has 14 tokens, q has S = 11"),
    ({"layout": LAYOUT, "text_len": 2}, ValueError, "text_len=2, text_first=False contradict layout"),
    ({"layout": LAYOUT, "text_first": True}, ValueError, "text_len=0, text_first=True contradict layout"),
    ({"layout": (1, 11, 1)}, TypeError, "layout must be a hhattn.VideoLayout, got tuple"),
    ({"eps": -1}, ValueError, "eps=-1 must not be negative"),
]


@pytest.mark.cpu_only("arguments are refused before their device matters")
@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m[:24] for _, _, m in BAD])
def test_refusals(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        hhattn.qk_norm_rope(**arguments() | change)


def test_an_odd_dim_can_not_be_rotated() -> None:
    with pytest.raises(ValueError, match="q has D = 7; rotary pairs need an even D"):
        hhattn.qk_norm_rope(**arguments(dim=7))
