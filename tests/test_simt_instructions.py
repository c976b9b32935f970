"""The emulator's instructions against arithmetic of our own, element by element, as the PTX ISA has their fragments."""

import ctypes
import os
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="the emulator is built with g++")
BF16, F16, TF32 = range(3)


@pytest.fixture(scope="module")
def kernels():
    from hhattn.simt.runtime import build_cu

    return build_cu(Path(__file__).parent / "simt" / "instructions.cu")


@pytest.fixture
def run(kernels):
    """Calls a kernel with numpy arrays, which it may read and write, and scalars; fails on any report."""
    from hhattn.simt.runtime import runtime

    emulator = runtime()

    def call(name, *args):
        emulator.reset()
        passed = []
        for i, a in enumerate(args):
            if isinstance(a, np.ndarray):
                emulator.register(torch.from_numpy(a.view(np.int32)), f"argument {i}")
                a = ctypes.c_void_p(a.ctypes.data)
            passed.append(a)
        getattr(kernels, f"run_{name}")(*passed)
        assert not emulator.reports(), str(emulator.reports()[0])

    yield call
    emulator.reset()


def bits16(values, kind):
    """The 16-bit patterns of floats, rounded by torch."""
    dtype = torch.bfloat16 if kind == BF16 else torch.float16
    return torch.from_numpy(np.asarray(values, np.float32)).to(dtype).view(torch.int16).numpy().view(np.uint16)


def rounded(values, kind):
    if kind == TF32:  # the lower 13 bits are ignored
        return (np.asarray(values, np.float32).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    dtype = torch.bfloat16 if kind == BF16 else torch.float16
    return torch.from_numpy(np.asarray(values, np.float32)).to(dtype).float().numpy()


def words(elements, kind):
    """Registers of 32 bits from consecutive elements."""
    if kind == TF32:
        return np.ascontiguousarray(elements, np.float32).view(np.uint32)
    return np.ascontiguousarray(bits16(elements, kind)).view(np.uint32)


# ---- fragments of mma.m16n8k: element i of lane's registers lies at (row, column)
def a_place(lane, i, kind):
    group, t = lane // 4, lane % 4
    if kind == TF32:
        return group + 8 * (i % 2), t + 4 * (i // 2)
    return group + 8 * (i // 2 % 2), 2 * t + i % 2 + 8 * (i // 4)


def b_place(lane, i, kind):
    group, t = lane // 4, lane % 4
    return (t + 4 * i, group) if kind == TF32 else (2 * t + i % 2 + 8 * (i // 2), group)


def c_place(lane, i):
    return lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2


def fragments(matrix, place, count, *args):
    return np.array([[matrix[place(lane, i, *args)] for i in range(count)] for lane in range(32)], np.float32)


@pytest.mark.parametrize(
    ("code", "kind", "k", "half_sums"),
    [
        *((0, BF16, 16, False), (1, BF16, 8, False), (2, F16, 16, False), (3, F16, 8, False)),
        *((4, TF32, 8, False), (5, TF32, 4, False), (6, F16, 16, True), (7, F16, 8, True)),
    ],
)
def test_mma(run, code, kind, k, half_sums):
    rng = np.random.default_rng(code)
    a, b, c = (rng.standard_normal(shape).astype(np.float32) for shape in ((16, k), (k, 8), (16, 8)))
    if half_sums:
        c = rounded(c, F16)
    regs_a = words(fragments(a, a_place, 16 * k // 32, kind), kind)
    regs_b = words(fragments(b, b_place, 8 * k // 32, kind), kind)
    frag_c = fragments(c, c_place, 4)
    regs_c = words(frag_c, F16) if half_sums else frag_c.view(np.uint32)
    out = np.zeros_like(regs_c)
    run(
        "mma",
        code,
        regs_a.shape[1],
        regs_b.shape[1],
        regs_c.shape[1],
        regs_a,
        regs_b,
        np.ascontiguousarray(regs_c),
        out,
    )
    expected = fragments(rounded(a, kind).astype(np.float64) @ rounded(b, kind).astype(np.float64) + c, c_place, 4)
    got = out.view(np.float16).astype(np.float32) if half_sums else out.view(np.float32)
    np.testing.assert_allclose(got, expected, rtol=2e-3 if half_sums else 1e-5, atol=4e-3 if half_sums else 1e-5)


@pytest.mark.parametrize("trans", [0, 1])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_and_stmatrix(run, count, trans):
    matrices = np.arange(count * 64, dtype=np.uint16).reshape(count, 8, 8)
    registers = np.zeros((32, count, 2), np.uint16)
    for lane in range(32):
        for m in range(count):
            for half in range(2):
                row, column = lane // 4, 2 * (lane % 4) + half
                registers[lane, m, half] = matrices[m, column, row] if trans else matrices[m, row, column]
    out = np.zeros(32 * count, np.uint32)
    run("matrices", 0, count, trans, matrices.copy().view(np.uint32), out)
    np.testing.assert_array_equal(out, registers.view(np.uint32).ravel())
    run("matrices", 1, count, trans, registers.copy().view(np.uint32).ravel(), out)
    np.testing.assert_array_equal(out.view(np.uint16).reshape(count, 8, 8), matrices)


@pytest.mark.parametrize("mode", ["idx", "up", "down", "bfly"])
@pytest.mark.parametrize("width", [32, 8])
@pytest.mark.parametrize("by", [0, 1, 5, 16, 31])
def test_shfl(run, mode, width, by):
    values = np.random.default_rng(by).integers(0, 2**32, 32, dtype=np.uint32)
    out, in_range = np.zeros_like(values), np.zeros_like(values)
    clamp = (32 - width) << 8 | (0 if mode == "up" else 31)
    run("shuffles", ["idx", "up", "down", "bfly"].index(mode), by, clamp, values, out, in_range)
    for lane in range(32):
        first = lane // width * width
        source = {"idx": first + by % width, "up": lane - by, "down": lane + by, "bfly": lane ^ by}[mode]
        ok = first <= source < first + width or (mode == "bfly" and source < first)
        assert in_range[lane] == ok
        assert out[lane] == values[source if ok else lane]


@pytest.mark.parametrize("mask", [0xFFFFFFFF, 0x00FF0F01])
def test_votes_and_reductions(run, mask):
    values = np.random.default_rng(3).integers(0, 2**32, 32, dtype=np.uint32)
    out = np.zeros((32, 11), np.uint32)
    run("votes", ctypes.c_uint32(mask), values, out)
    lanes = [lane for lane in range(32) if mask >> lane & 1]
    mine = values[lanes]
    odd = [int(v) & 1 for v in mine]
    expected = [sum(bit << lane for lane, bit in zip(lanes, odd, strict=True)), any(odd), all(odd)]
    expected += [int(mine.sum(dtype=np.uint64)) % 2**32]
    expected += [int(x) % 2**32 for x in (mine.view(np.int32).min(), mine.view(np.int32).max(), mine.min(), mine.max())]
    expected += [int(f.reduce(mine)) for f in (np.bitwise_and, np.bitwise_or, np.bitwise_xor)]
    for lane in lanes:
        assert out[lane].tolist() == expected


# ---- wgmma: 64 x n x (16 or 8), operands placed into shared memory element by element
WIDTHS = {0: 16, 3: 32, 2: 64, 1: 128}  # layout type of the descriptor -> bytes of a swizzled row


def swizzle(offset, width):
    """16-byte units within a row are exchanged by the number of the row of 128 bytes."""
    return offset ^ ((offset >> 7) % (width // 16)) << 4


def place_operand(image, start, matrix, kind, layout, mn_major):
    """Writes rows (of M or N) x k into the image; returns the descriptor's low part for that start."""
    rows, depth = matrix.shape
    size, width = (4, WIDTHS[layout]) if kind == TF32 else (2, WIDTHS[layout])
    fast, slow = (rows, depth) if mn_major else (depth, rows)
    per_row = width // size
    group = 8 * width  # eight rows of the layout
    groups_slow = slow // 8
    tile = group * groups_slow  # one width of the fast dimension, all of the slow one
    for s in range(slow):
        for f in range(fast):
            offset = f // per_row * tile + s // 8 * group + s % 8 * width + f % per_row * size
            at = start + swizzle(offset, width)
            value = matrix[f, s] if mn_major else matrix[s, f]
            image[at : at + size] = np.frombuffer(
                words([value], kind).tobytes() if kind == TF32 else bits16([value], kind).tobytes(), np.uint8
            )
    leading, stride = (group, tile) if mn_major and layout == 0 else (tile, group)
    return start >> 4 | (leading >> 4) << 16 | (stride >> 4) << 32 | layout << 62


CASES = [
    (kind, layout, a_regs, ta, tb)
    for kind in (BF16, F16)
    for layout in WIDTHS
    for a_regs, ta, tb in ((1, 0, 0), (0, 0, 1), (0, 1, 0))
]
CASES += [(TF32, layout, a_regs, 0, 0) for layout in WIDTHS for a_regs in (0, 1)]


@pytest.mark.parametrize(("kind", "layout", "a_registers", "trans_a", "trans_b"), CASES)
def test_wgmma(run, kind, layout, a_registers, trans_a, trans_b):
    n, k = 64, 8 if kind == TF32 else 16
    rng = np.random.default_rng(layout)
    a, b, c = (rng.standard_normal(shape).astype(np.float32) for shape in ((64, k), (n, k), (64, n)))
    image = np.zeros(32768, np.uint8)
    # without swizzle k is two units of 16 bytes; with it a row is longer than k and the rest stays unused
    width = WIDTHS[layout] // (4 if kind == TF32 else 2)

    def pad(matrix, trans):
        return matrix if trans else np.pad(matrix, ((0, 0), (0, max(width - k, 0))))

    a_desc = place_operand(image, 0, pad(a, trans_a), kind, layout, trans_a)
    b_desc = place_operand(image, 16384, pad(b, trans_b), kind, layout, trans_b)
    lanes = [(t // 32, t % 32) for t in range(128)]
    count = 4 if kind == TF32 else 8
    frag_a = np.array(
        [[a[16 * w + a_place(lane, i, kind)[0], a_place(lane, i, kind)[1]] for i in range(count)] for w, lane in lanes]
    )
    places = [
        [(16 * w + lane // 4 + 8 * (i // 2 % 2), i // 4 * 8 + 2 * (lane % 4) + i % 2) for i in range(n // 2)]
        for w, lane in lanes
    ]
    d = np.array([[c[p] for p in row] for row in places], np.float32)
    sign, accumulate = (-1, 1) if layout == 1 else (1, layout % 2)
    registers = words(frag_a, kind) if a_registers else None
    run(
        *("wgmma", n, kind, accumulate, sign, 1, trans_a, trans_b, registers),
        *(ctypes.c_uint64(a_desc), ctypes.c_uint64(b_desc), image.view(np.uint32), 8192, d.view(np.uint32)),
    )
    product = sign * rounded(a, kind).astype(np.float64) @ rounded(b, kind).astype(np.float64).T
    expected = 2 * product + (c if accumulate else 0)
    np.testing.assert_allclose(d, [[expected[p] for p in row] for row in places], rtol=1e-5, atol=1e-4)


# ---- one thread
SCALARS = (
    *("bfe_u32", "bfe_s32", "bfi", "prmt", "lop3", "shf_l", "shf_r", "bf16x2", "f16x2", "bf16x2_rz", "f16x2_rz"),
    *("tf32", "from_f16", "fma_bf16", "fma_f16", "max", "min_nan"),
)


def scalar(kernels, name, a, b=0, c=0, d=0):
    columns = [
        np.ascontiguousarray(np.broadcast_to(np.asarray(x).astype(np.uint32), np.shape(a))) for x in (a, b, c, d)
    ]
    out = np.zeros(np.shape(a), np.uint32)
    pointers = [ctypes.c_void_p(x.ctypes.data) for x in (*columns, out)]
    kernels.run_scalar(SCALARS.index(name), out.size, *pointers)
    return out


@pytest.fixture
def random_words():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 2**32, 4000, dtype=np.uint32) for _ in range(4)]


def test_bit_fields(kernels, random_words):
    a, b, *_ = random_words
    rng = np.random.default_rng(1)
    pos, length = rng.integers(0, 40, a.size), rng.integers(0, 40, a.size)
    unsigned, signed, inserted = (
        scalar(kernels, "bfe_u32", a, pos, length),
        scalar(kernels, "bfe_s32", a, pos, length),
        scalar(kernels, "bfi", a, b, pos, length),
    )
    for i in range(a.size):
        x, p, n = int(a[i]), int(pos[i]), int(length[i])
        assert unsigned[i] == (x >> p) % 2 ** min(n, 32)
        wide = x - (x >> 31 << 32)  # sign extended without end; the field's own sign is its top bit, or bit 31
        top = x >> min(p + n - 1, 31) & 1 if n else 0
        field = (wide >> p) % 2**n if n else 0
        expected = (field | (-1 << n if top else 0)) % 2**32 if p + n <= 32 else (wide >> p) % 2**32
        assert signed[i] == (expected if n else 0)
        mask = (2**n - 1 << p) % 2**32
        assert inserted[i] == (int(b[i]) & ~mask | (x << p) & mask)


def test_permutations_logic_and_funnel_shifts(kernels, random_words):
    a, b, c, d = random_words
    permuted, logic = scalar(kernels, "prmt", a, b, c), scalar(kernels, "lop3", a, b, c, d)
    left, right = scalar(kernels, "shf_l", a, b, c % 50, d), scalar(kernels, "shf_r", a, b, c % 50, d)
    for i in range(0, a.size, 4):
        source = list(int(a[i]).to_bytes(4, "little") + int(b[i]).to_bytes(4, "little"))
        picks = [int(c[i]) >> 4 * j & 15 for j in range(4)]
        expected = [(255 if source[p & 7] > 127 else 0) if p & 8 else source[p] for p in picks]
        assert list(int(permuted[i]).to_bytes(4, "little")) == expected
        table = int(d[i]) & 255
        bits = [
            table >> (int(a[i]) >> j & 1) * 4 + (int(b[i]) >> j & 1) * 2 + (int(c[i]) >> j & 1) & 1 for j in range(32)
        ]
        assert int(logic[i]) == sum(bit << j for j, bit in enumerate(bits))
        by = int(c[i]) % 50
        by = by % 32 if d[i] & 1 else min(by, 32)
        pair = int(b[i]) << 32 | int(a[i])
        assert int(left[i]) == (pair << by >> 32) % 2**32
        assert int(right[i]) == (pair >> by) % 2**32


def test_conversions_round_as_numpy_and_torch_do(kernels, random_words):
    a, b = random_words[:2]
    tiny = np.random.default_rng(2).standard_normal(4000).astype(np.float32) * np.float32(1e-6)  # subnormal as float16
    a, b = (
        np.concatenate([a, tiny.view(np.uint32)]),
        np.concatenate([b, (tiny * 2e10).astype(np.float32).view(np.uint32)]),
    )
    x, y = (v.view(np.float32) for v in (a, b))
    keep = ~(np.isnan(x) | np.isnan(y))
    x, y, a, b = x[keep], y[keep], a[keep], b[keep]
    for name, kind in (("bf16x2", BF16), ("f16x2", F16)):
        expected = bits16(x, kind).astype(np.uint32) << 16 | bits16(y, kind)
        np.testing.assert_array_equal(scalar(kernels, name, a, b), expected)
        toward_zero = scalar(kernels, f"{name}_rz", a, b)
        for value, got in ((x, toward_zero >> 16), (y, toward_zero & 0xFFFF)):
            near = bits16(value, kind)
            size = np.abs(rounded(value, kind).astype(np.float64))
            # one step back where rounding went away from zero; infinity from a finite value too
            back = near - (size > np.abs(value.astype(np.float64))).astype(np.uint16)
            np.testing.assert_array_equal(got, back)
    halves = np.arange(65536, dtype=np.uint32)
    got, expected = scalar(kernels, "from_f16", halves).view(np.float32), halves.astype(np.uint16).view(np.float16)
    np.testing.assert_array_equal(got, expected.astype(np.float32))
    x = x[np.abs(x) < 1e38]
    ulp = 2.0 ** np.maximum(np.frexp(x.astype(np.float64))[1] - 11, -136)
    away = np.sign(x) * np.floor(np.abs(x.astype(np.float64)) / ulp + 0.5) * ulp
    np.testing.assert_array_equal(scalar(kernels, "tf32", x.view(np.uint32)).view(np.float32), away.astype(np.float32))


@pytest.mark.parametrize("name", ["fma_bf16", "fma_f16"])
def test_fma_of_16_bits_rounds_once(kernels, name):
    kind = BF16 if name == "fma_bf16" else F16
    rng = np.random.default_rng(5)
    a, b, c = (bits16(rng.standard_normal(3000) * 2.0 ** rng.integers(-6, 6, 3000), kind) for _ in range(3))
    got = scalar(kernels, name, a, b, c).astype(np.uint16)

    def value(bits):
        dtype = torch.bfloat16 if kind == BF16 else torch.float16
        return torch.from_numpy(bits.view(np.int16)).view(dtype).double().numpy()

    for x, y, z, bits in zip(value(a), value(b), value(c), got, strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        around = np.array([bits - 1, bits, bits + 1], np.uint16)
        errors = [abs(Fraction(float(v)) - exact) for v in value(around)]
        assert errors[1] <= min(errors)
        if errors[1] in (errors[0], errors[2]):
            assert bits % 2 == 0  # ties to even


def test_maxima_with_nan_and_zeros(kernels):
    f = np.array([1, np.nan, -0.0, 0.0, -np.inf], np.float32)
    a, b = (m.ravel().view(np.uint32) for m in np.meshgrid(f, f))
    x, y = a.view(np.float32), b.view(np.float32)
    got = scalar(kernels, "max", a, b).view(np.float32)
    np.testing.assert_array_equal(got, np.fmax(x, y))
    zeros = (x == 0) & (y == 0)
    np.testing.assert_array_equal(np.signbit(got[zeros]), np.signbit(x[zeros]) & np.signbit(y[zeros]))
    np.testing.assert_array_equal(scalar(kernels, "min_nan", a, b).view(np.float32), np.minimum(x, y))
