"""The translation of PTX: every scalar instruction, executed, against numpy; what is not known is refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from hhattn.ops import _triton
from hhattn.simt import build
from hhattn.simt._pointers import stored
from hhattn.simt.ptx import PtxError, parse
from hhattn.simt.runtime import READ_ONLY, WRITE_FIRST, runtime
from hhattn.simt.translate import translate

pytestmark = pytest.mark.skipif(_triton.interpreted(), reason="the interpreter runs no PTX")
N = 64
EDGES = (0, 1, 2, 31, 32, 33, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
U32 = np.random.default_rng(0).integers(0, 2**32, (3, N), dtype=np.uint32)
for _i in range(3):
    U32[_i, : len(EDGES)] = np.roll(EDGES, 5 * _i)
F32 = np.random.default_rng(1).normal(size=(3, N)).astype(np.float32)
F32[0, :12] = [0, -0.0, np.inf, -np.inf, np.nan, 1, -1, 65504, 65520, 6e-8, 1e-40, 3.4e38]
F32[1, :12] = [-0.0, 0, 1, np.inf, 2, np.nan, -1, 1, 2, 3, 1, 3]


def kernel(body: str, words: int) -> str:
    """PTX: thread i reads words a, b, c of its own as %r1 to %r3, runs ``body``, writes %r100 and on."""
    stores = "\n".join(f"st.global.b32 [%rd4+{4 * N * i}], %r{100 + i};" for i in range(words))
    return f"""
.visible .entry one(.param .u64 .ptr .global .align 1 one_param_0, .param .u64 .ptr .global .align 1 one_param_1)
{{
    .reg .pred %p<9>;
    .reg .b16 %rs<9>;
    .reg .b32 %r<{100 + words}>;
    .reg .b64 %rd<9>;
    .loc 1 7 0
    ld.param.b64 %rd1, [one_param_0];
    ld.param.b64 %rd2, [one_param_1];
    mov.u32 %r4, %tid.x;
    mul.wide.u32 %rd5, %r4, 4;
    add.s64 %rd3, %rd1, %rd5;
    add.s64 %rd4, %rd2, %rd5;
    ld.global.b32 %r1, [%rd3];
    ld.global.b32 %r2, [%rd3+{4 * N}];
    ld.global.b32 %r3, [%rd3+{8 * N}];
{body}
{stores}
    ret;
}}
.file 1 "/somewhere/source.py"
"""


def run(body: str, inputs: np.ndarray, words: int) -> np.ndarray:
    text = kernel(body, words)
    out = torch.zeros(words, N, dtype=torch.int32)
    data = torch.from_numpy(inputs.view(np.int32).copy())
    emulator = runtime()
    emulator.reset()
    emulator.options()
    emulator.register(data, "in", READ_ONLY)
    emulator.register(out, "out", WRITE_FIRST)
    packed = data.data_ptr().to_bytes(8, "little") + out.data_ptr().to_bytes(8, "little")
    emulator.launch("one", build.load(text), packed, (1, 1, 1), (N, 1, 1))
    assert not emulator.reports()
    return out.numpy().view(np.uint32)


def scalar(f: Callable[..., int]) -> Callable[..., np.ndarray]:
    """A function of Python integers for every thread, modulo 2^32."""
    return lambda *columns: np.array(
        [int(f(*(int(x) for x in row))) % 2**32 for row in zip(*columns, strict=True)], np.uint32
    )


def signed(x: int, bits: int = 32) -> int:
    return x - (x >> (bits - 1) << bits)


def field(x: int, at: int, count: int, is_signed: bool) -> int:
    at, count = at & 255, count & 255
    wide = signed(x) if is_signed else x
    return (
        0
        if count == 0
        else (signed(wide >> at & ((1 << count) - 1), count) if is_signed else x >> at & ((1 << count) - 1))
    )


def permuted(a: int, b: int, selector: int) -> int:
    both = (b << 32 | a).to_bytes(8, "little")
    picks = [selector >> 4 * i & 15 for i in range(4)]
    return int.from_bytes(bytes((255 if both[p & 7] > 127 else 0) if p & 8 else both[p & 7] for p in picks), "little")


def toward_zero(a: int, b: int) -> int:
    return -(abs(a) // abs(b)) if (a < 0) != (b < 0) else abs(a) // abs(b)


INTEGERS: dict[str, Callable[..., np.ndarray]] = {
    "add.s32 D, A, B": scalar(lambda a, b, c: a + b),
    "sub.s32 D, A, B": scalar(lambda a, b, c: a - b),
    "mul.lo.s32 D, A, B": scalar(lambda a, b, c: a * b),
    "mul.hi.s32 D, A, B": scalar(lambda a, b, c: signed(a) * signed(b) >> 32),
    "mul.hi.u32 D, A, B": scalar(lambda a, b, c: a * b >> 32),
    "mad.lo.s32 D, A, B, C": scalar(lambda a, b, c: a * b + c),
    "min.s32 D, A, B": scalar(lambda a, b, c: min(signed(a), signed(b))),
    "max.u32 D, A, B": scalar(lambda a, b, c: max(a, b)),
    "shl.b32 D, A, B": scalar(lambda a, b, c: a << min(b, 32)),
    "shr.u32 D, A, B": scalar(lambda a, b, c: a >> min(b, 32)),
    "shr.s32 D, A, B": scalar(lambda a, b, c: signed(a) >> min(b, 32)),
    "and.b32 D, A, B": scalar(lambda a, b, c: a & b),
    "or.b32 D, A, B": scalar(lambda a, b, c: a | b),
    "xor.b32 D, A, B": scalar(lambda a, b, c: a ^ b),
    "not.b32 D, A": scalar(lambda a, b, c: ~a),
    "neg.s32 D, A": scalar(lambda a, b, c: -a),
    "abs.s32 D, A": scalar(lambda a, b, c: abs(signed(a))),
    "popc.b32 D, A": scalar(lambda a, b, c: bin(a).count("1")),
    "clz.b32 D, A": scalar(lambda a, b, c: 32 - a.bit_length()),
    "brev.b32 D, A": scalar(lambda a, b, c: int(f"{a:032b}"[::-1], 2)),
    "bfe.u32 D, A, 5, 9": scalar(lambda a, b, c: field(a, 5, 9, False)),
    "bfe.s32 D, A, 2, 1": scalar(lambda a, b, c: field(a, 2, 1, True)),
    "bfe.s32 D, A, 25, 9": scalar(lambda a, b, c: signed(a) >> 25),
    "bfi.b32 D, A, B, 5, 9": scalar(lambda a, b, c: b & ~(0x1FF << 5) | (a & 0x1FF) << 5),
    "prmt.b32 D, A, B, C": scalar(permuted),
    "prmt.b32 D, A, B, 0x5410": scalar(lambda a, b, c: (b & 0xFFFF) << 16 | a & 0xFFFF),
    "lop3.b32 D, A, B, C, 0xCA": scalar(lambda a, b, c: a & b | ~a & c),
    "shf.l.wrap.b32 D, A, B, C": scalar(lambda a, b, c: (b << 32 | a) << (c & 31) >> 32),
    "shf.r.clamp.b32 D, A, B, C": scalar(lambda a, b, c: (b << 32 | a) >> min(c, 32)),
    "div.u32 D, A, B": scalar(lambda a, b, c: a // b if b else 2**32 - 1),
    "div.s32 D, A, 7": scalar(lambda a, b, c: toward_zero(signed(a), 7)),
    "rem.s32 D, A, -7": scalar(lambda a, b, c: signed(a) - toward_zero(signed(a), -7) * -7),
    "setp.lt.s32 %p1, A, B; selp.b32 D, 1, 0, %p1": scalar(lambda a, b, c: signed(a) < signed(b)),
    "setp.gt.u32 %p1, A, B; selp.b32 D, 1, 0, %p1": scalar(lambda a, b, c: a > b),
    "setp.ne.b32 %p1, A, B; not.pred %p2, %p1; selp.b32 D, 1, 0, %p2": scalar(lambda a, b, c: a == b),
    "cvt.u32.u16 D, 70000": scalar(lambda a, b, c: 70000 & 0xFFFF),
    "cvt.u16.u32 %rs1, A; cvt.u32.u16 D, %rs1": scalar(lambda a, b, c: a & 0xFFFF),
    "cvt.s64.s32 %rd6, A; shr.s64 %rd7, %rd6, 32; cvt.u32.u64 D, %rd7": scalar(lambda a, b, c: signed(a) >> 32),
    "mov.b32 {%rs1, %rs2}, A; mov.b32 D, {%rs2, %rs1}": scalar(lambda a, b, c: a >> 16 | a << 16),
    "mov.b32 {_, %rs2}, A; cvt.u32.u16 D, %rs2": scalar(lambda a, b, c: a >> 16),
    "mul.wide.s32 %rd6, A, B; mov.b64 {_, D}, %rd6": scalar(lambda a, b, c: signed(a) * signed(b) >> 32),
    "setp.ne.b32 %p8, A, A; mov.b32 D, 0; @!%p8 mov.b32 D, A": scalar(lambda a, b, c: a),
    "mov.b32 D, %r50": scalar(lambda a, b, c: 0xFFFFFFFF),  # never written
    "st.global.b32 [%rd4], A; ld.global.s8 D, [%rd4]": scalar(lambda a, b, c: signed(a & 255, 8)),
    "ld.global.s16 %rd6, [%rd3+2]; shr.u64 %rd7, %rd6, 16; cvt.u32.u64 D, %rd7": scalar(
        lambda a, b, c: signed(a) >> 31
    ),
    "ld.global.u16 D, [%rd3+2]": scalar(lambda a, b, c: a >> 16),
    "shfl.sync.down.b32 %r5|%p1, A, 31, 31, -1; selp.b32 D, A, 0, %p1": lambda a, b, c: np.where(
        np.arange(N) % 32, 0, a
    ),
    "shfl.sync.idx.b32 D|%p1, A, 3, 31, -1; selp.b32 D, 1, 0, %p1": scalar(lambda a, b, c: 1),
    "add.s32 %r5, A, 1; setp.gt.s32 %p1, %r5, A; selp.b32 D, 1, 0, %p1": scalar(lambda a, b, c: a != 0x7FFFFFFF),
}
f32 = np.float32


def half(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The bits of float32 values rounded to a 16-bit dtype."""
    return torch.from_numpy(x).to(dtype).view(torch.int16).numpy().astype(np.uint16).astype(np.uint32)


def tf32(a: np.ndarray) -> np.ndarray:
    """Nearest with 10 bits of mantissa, ties away from zero."""
    finite = np.where(np.isfinite(a), a, 0)
    exponent = np.maximum(np.frexp(finite)[1], -125)  # below the normal numbers the last bit stays where it is
    away = np.trunc(np.abs(np.ldexp(finite.astype(np.float64), 11 - exponent)) + 0.5)
    rounded = np.copysign(np.ldexp(away, exponent - 11), a)
    return np.where(np.isfinite(a), rounded, a).astype(f32)


def flushed(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(f32(0), x), x).astype(f32)


FLOATS: dict[str, Callable[..., np.ndarray]] = {
    "add.f32 D, A, B": lambda a, b, c: a + b,
    "sub.f32 D, A, B": lambda a, b, c: a - b,
    "mul.f32 D, A, B": lambda a, b, c: a * b,
    "fma.rn.f32 D, A, B, C": lambda a, b, c: (a.astype(np.float64) * b + c).astype(f32),
    "add.ftz.f32 D, A, 0f00000000": lambda a, b, c: flushed(a),
    "div.full.f32 D, A, B": lambda a, b, c: a / b,
    "neg.f32 D, A": lambda a, b, c: -a,
    "abs.f32 D, A": lambda a, b, c: np.abs(a),
    "max.f32 D, A, B": lambda a, b, c: np.fmax(a, b),
    "min.f32 D, A, B": lambda a, b, c: np.fmin(a, b),
    "max.NaN.f32 D, A, B": lambda a, b, c: np.maximum(a, b),
    "sqrt.rn.f32 D, A": lambda a, b, c: np.sqrt(a),
    "rcp.approx.ftz.f32 D, A": lambda a, b, c: flushed(1 / flushed(a)),
    "ex2.approx.ftz.f32 D, B": lambda a, b, c: np.exp2(b.astype(np.float64)).astype(f32),
    "setp.num.f32 %p1, A, B; selp.f32 D, A, B, %p1": lambda a, b, c: np.where(np.isnan(a) | np.isnan(b), b, a),
    "setp.neu.f32 %p1, A, B; selp.f32 D, 0f3F800000, 0f00000000, %p1": lambda a, b, c: (a != b).astype(f32),
    "setp.ne.f32 %p1, A, B; selp.f32 D, 0f3F800000, 0f00000000, %p1": lambda a, b, c: ((a < b) | (a > b)).astype(f32),
    "setp.geu.f32 %p1, A, B; selp.f32 D, 0f3F800000, 0f00000000, %p1": lambda a, b, c: (~(a < b)).astype(f32),
    "setp.lt.f32 %p1, A, B; selp.f32 D, 0f3F800000, 0f00000000, %p1": lambda a, b, c: (a < b).astype(f32),
    "cvt.rna.tf32.f32 D, A": lambda a, b, c: tf32(a),
    "cvt.rn.bf16.f32 %rs1, A; cvt.f32.bf16 D, %rs1": lambda a, b, c: torch.from_numpy(a).bfloat16().float().numpy(),
    "cvt.rn.f16.f32 %rs1, A; cvt.f32.f16 D, %rs1": lambda a, b, c: torch.from_numpy(a).half().float().numpy(),
    "cvt.rni.f32.f32 D, A": lambda a, b, c: np.rint(a),
    "cvt.rzi.s32.f32 %r5, C; cvt.rn.f32.s32 D, %r5": lambda a, b, c: np.trunc(c),
}  # fmt: skip


def body(name: str, i: int) -> str:
    """A case's instructions, with its result in %r(100 + i)."""
    code = name
    for letter, register in (("D", f"%r{100 + i}"), ("A", "%r1"), ("B", "%r2"), ("C", "%r3")):
        code = re.sub(rf"(?<![\w%]){letter}(?!\w)", register, code)
    return "\n".join(f"{part.strip()};" for part in code.split(";"))


def test_integer_instructions() -> None:
    out = run("\n".join(body(name, i) for i, name in enumerate(INTEGERS)), U32, len(INTEGERS))
    for got, (name, expected) in zip(out, INTEGERS.items(), strict=True):
        np.testing.assert_array_equal(got, expected(*U32), err_msg=name)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_float_instructions() -> None:
    out = run("\n".join(body(name, i) for i, name in enumerate(FLOATS)), F32, len(FLOATS)).view(f32)
    for got, (name, expected) in zip(out, FLOATS.items(), strict=True):
        want = expected(*F32)
        ulps = 1 if "ex2" in name else 0
        np.testing.assert_array_max_ulp(got[~np.isnan(want)], want[~np.isnan(want)], ulps), name
        assert np.isnan(got[np.isnan(want)]).all(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_packed_conversion(dtype: torch.dtype) -> None:
    kind = "f16x2" if dtype == torch.float16 else "bf16x2"
    out = run(f"cvt.rn.{kind}.f32 %r100, %r1, %r2;", F32, 1)[0]
    finite = ~(np.isnan(F32[0]) | np.isnan(F32[1]))
    want = half(F32[1], dtype) | half(F32[0], dtype) << 16
    np.testing.assert_array_equal(out[finite], want[finite])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_comparison_of_pairs_has_two_results(dtype: torch.dtype) -> None:
    kind = "f16x2" if dtype == torch.float16 else "bf16x2"
    values = np.random.default_rng(4).integers(-2, 3, (2, 2, N)).astype(f32)  # [operand, half]: ties, signs
    low, high = (half(values[:, i].ravel(), dtype).reshape(2, N) for i in (0, 1))
    words = np.stack([*(low | high << 16), low[0]]).astype(np.uint32)
    picks = "\n".join(f"selp.b32 %r{100 + i}, 1, 0, %p{1 + i};" for i in range(2))
    out = run(f"setp.le.{kind} %p1|%p2, %r1, %r2;\n{picks}", words, 2)
    np.testing.assert_array_equal(out, values[0] <= values[1])


def test_a_comparison_may_give_its_opposite_too() -> None:
    picks = "\n".join(f"selp.b32 %r{100 + i}, 1, 0, %p{1 + i};" for i in range(2))
    out = run(f"setp.lt.u32 %p1|%p2, %r1, %r2;\n{picks}", U32, 2)
    np.testing.assert_array_equal(out, [U32[0] < U32[1], U32[0] >= U32[1]])


def test_half_precision_numbers_convert_both_ways() -> None:
    """64 neighbours from each sixteenth of the 65,536 of each kind: every sign, subnormal, infinite and NaN ones."""
    for kind, dtype in (("f16", torch.float16), ("bf16", torch.bfloat16)):
        to = f"cvt.u16.u32 %rs1, %r1;\ncvt.f32.{kind} %r100, %rs1;\n"
        code = f"{to}cvt.rn.{kind}.f32 %rs2, %r100;\ncvt.u32.u16 %r101, %rs2;"
        for first in [*range(0, 65536, 4096), 0x7BE0, 0x7F60, 0xFBE0, 0xFF60]:
            bits = np.arange(first, first + N, dtype=np.uint32)
            out = run(code, np.stack([bits, bits, bits]), 2)
            value = torch.from_numpy(bits.astype(np.uint16).view(np.int16)).view(dtype).float().numpy()
            np.testing.assert_array_equal(out[0].view(f32), value)
            numbers = ~np.isnan(value)
            np.testing.assert_array_equal(out[1][numbers], bits[numbers])


@pytest.mark.parametrize(("kind", "one", "bits"), [("f16", 0x3C00, 10), ("bf16", 0x3F80, 7)])
def test_half_precision_fma_rounds_once(kind: str, one: int, bits: int) -> None:
    """(1 + u) 1.5 is a tie; plus or minus 2^-24 decides it, and in float that is lost."""
    dtype = torch.float16 if kind == "f16" else torch.bfloat16
    tiny = half(np.where(np.arange(N) % 2, 2.0**-24, -(2.0**-24)).astype(f32), dtype)
    middle = one + (1 << (bits - 1))
    a, b = (np.full(N, x, np.uint32) for x in (one + 1, middle))
    expected = (middle + 1 + np.arange(N) % 2).astype(np.uint32)
    words = np.stack([x | x << 16 for x in (a, b, tiny)]).astype(np.uint32)
    scalar_fma = "mov.b32 {%rs1, _}, %r1;\nmov.b32 {%rs2, _}, %r2;\nmov.b32 {%rs3, _}, %r3;\n"
    scalar_fma += f"fma.rn.{kind} %rs4, %rs1, %rs2, %rs3;\ncvt.u32.u16 %r101, %rs4;"
    out = run(f"fma.rn.{kind}x2 %r100, %r1, %r2, %r3;\n{scalar_fma}", words, 2)
    np.testing.assert_array_equal(out, [expected | expected << 16, expected])


def test_integers_round_once_to_half_precision() -> None:
    x = np.array([2**24 + 2**16 + 1, 2**24 + 2**16 - 1, 257, 258, 2**31 - 1, 0, 1, -3] * 8, np.int64)
    out = run(
        "cvt.rn.bf16.s32 %rs1, %r1;\ncvt.u32.u16 %r100, %rs1;", np.stack([x.astype(np.int32).view(np.uint32)] * 3), 1
    )
    with np.errstate(all="ignore"):
        step = 2.0 ** np.maximum(np.frexp(x.astype(np.float64))[1] - 8, 0)
    np.testing.assert_array_equal(out[0], half((np.rint(x / step) * step).astype(f32), torch.bfloat16))


def test_a_signed_parameter_is_extended() -> None:
    text = """
.visible .entry one(.param .u64 .ptr .global .align 1 one_param_0, .param .u32 one_param_1)
{
    .reg .b64 %rd<4>;
    ld.param.b64 %rd1, [one_param_0];
    ld.param.s32 %rd2, [one_param_1];
    ld.param.u32 %rd3, [one_param_1];
    st.global.b64 [%rd1], %rd2;
    st.global.b64 [%rd1+8], %rd3;
    ret;
}
"""
    out = torch.zeros(2, dtype=torch.int64)
    emulator = runtime()
    emulator.reset()
    emulator.options()
    emulator.register(out, "out", WRITE_FIRST)
    packed = out.data_ptr().to_bytes(8, "little") + (2**32 - 1).to_bytes(8, "little")
    emulator.launch("one", build.load(text), packed, (1, 1, 1), (1, 1, 1))
    assert out.tolist() == [-1, 2**32 - 1]


@pytest.mark.parametrize(
    "code",
    [
        "frobnicate.f32 %r100, %r1;",
        "cvt.rn.satfinite.e4m3x2.f32 %rs1, %r1, %r2;",
        "mma.sync.aligned.m8n8k4 %r1;",
        "add.rz.f32 %r100, %r1, %r2;",
        "add.sat.s32 %r100, %r1, %r2;",
        "add.cc.u32 %r100, %r1, %r2;",
        "cvt.rz.bf16x2.f32 %r100, %r1, %r2;",
        "cvt.rz.f32.f64 %r100, %rd1;",
        "setp.lt.f16x2 %p1, %r1, %r2;",
        "brev.b64 %rd1, %rd2;",
        "max.f64 %rd1, %rd2, %rd3;",
        "min.xorsign.abs.f32 %r100, %r1, %r2;",
        "add.s32 %r100, %r1, %r2, %r3;",
        "add.s32 %r100|%r5, %r1, %r2;",
        "fma.rn.f32.bf16 %r100, %rs1, %rs2, %r3;",
        "cp.async.cg.shared.global.L2::cache_hint [%r1], [%rd3], 16, %rd1;",
        "cp.async.cg.shared.global [%r1], [%rd3], 16, %p1;",
        "cp.async.cg.shared.global [%r1], [%rd3], 16, 16, %rd1;",
        "st.global.L2::cache_hint.b32 [%rd4], %r1, %rd1;",
        "st.global.b32 [%rd4], %r1, %rd1;",
        "ld.global.v4.b32 {%r1, %r2}, [%rd3];",
        "ld.volatile.global.b32 %r1, [%rd3];",
        "mul.wide.s64 %rd1, %rd2, %rd3;",
        "bar.red.popc.u32 %r1, 0, %p1;",
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%r1, %r2, %r3, %r4}, {%r1, %r2, %r3, %r4}, {%r1, %r2}, "
        "{%r1, %r2, %r3, %r4};",
    ],
)
def test_an_unknown_instruction_is_refused_by_name(code: str) -> None:
    with pytest.raises(
        PtxError, match=re.escape(f"one, /somewhere/source.py:7: no translation of the PTX instruction {code!r}")
    ):
        translate(kernel(code, 1))


def test_text_that_is_no_ptx_is_refused() -> None:
    with pytest.raises(PtxError, match=r"can't read the PTX 'add.s32 %r1, \?\?;'"):
        parse(kernel("add.s32 %r1, ??;", 1))
    with pytest.raises(PtxError, match=r"no \.entry"):
        parse("// nothing")


def test_a_body_goes_on_behind_scopes_of_inline_assembly() -> None:
    inside = "{ // }\nadd.s32 %r5, %r1, 1;\n}\nadd.s32 %r100, %r5, 1;"
    np.testing.assert_array_equal(run(inside, U32, 1)[0], U32[0] + np.uint32(2))
    with pytest.raises(PtxError, match="braces"):
        parse(kernel("{", 1))


def test_a_parameter_that_is_an_array_is_refused() -> None:
    text = kernel("", 1).replace("(.param", "(.param .align 8 .b8 one_param_2[16], .param")
    with pytest.raises(PtxError, match=r"one: can't read the parameter '.param .align 8 .b8 one_param_2\[16\]'"):
        parse(text)


def test_which_parameters_are_stored_through() -> None:
    assert stored(parse(kernel("", 1))) == {1}
    assert stored(parse(kernel("st.global.b32 [%rd3], %r1;", 0))) == {0}
    assert stored(parse(kernel("selp.b64 %rd6, %rd3, %rd4, %p1;\nst.global.b32 [%rd6+8], %r1;", 0))) == {0, 1}
    assert stored(
        parse(kernel("ld.global.b64 %rd6, [%rd3];\nadd.s64 %rd7, %rd2, %rd6;\nst.global.b32 [%rd7], %r1;", 0))
    ) == {1}
