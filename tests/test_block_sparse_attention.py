"""Block-sparse attention: the numbers of the dense formula, gradients and lse included, whatever the mask."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from conftest import IMPLS
from helpers import DEVICE, assert_close_to_fp64, randn, strided
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hhattn
from hhattn import BlockMask, masks

pytestmark = pytest.mark.any_device

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=["automatic" if DEVICE == "cpu" else "reference", "triton", "cuda"])
def impl(request: pytest.FixtureRequest) -> Iterator[str]:
    """conftest's, and the CUDA kernels."""
    with hhattn.use_impl(None if request.param == "automatic" else request.param):
        yield request.param


@pytest.fixture
def single(impl: str) -> torch.dtype:
    """float32, or float16 for kernels that take nothing wider."""
    return torch.float16 if impl == "cuda" else torch.float32


def dense_formula(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """The definition in the dtype of its inputs: out [B, S, H, D], lse [B, H, S]. ``keep [B|1, H|1, Sq, Sk]``."""
    rep = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(rep, 2) for x in (k, v))
    s = torch.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    s = s.masked_fill(~keep, -math.inf)
    lse = s.logsumexp(-1)
    p = (s - lse.masked_fill(lse == -math.inf, 0)[..., None]).exp()
    return torch.einsum("bhqk,bkhd->bqhd", p, v), lse


def random_keep(*shape: int, share: float = 0.3, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), device="cpu").to(DEVICE) < share


def on_device(make: Callable[[], BlockMask]) -> BlockMask:
    """A mask that its builder makes on the CPU."""
    with torch.device("cpu"):
        mask = make()
    return mask.to(DEVICE)


def compare_with_formula(
    keep: Tensor, block_size: tuple[int, int], inputs: list[Tensor], empty: bool = False, scale: float | None = None
) -> None:
    """out, lse and the gradients of q, k and v, all of whose upstream gradients are there, against float64."""
    mask = BlockMask.from_dense(keep, block_size=block_size)
    q, v = inputs[0], inputs[2]
    upstream = randn(*q.shape[:3], v.shape[3], seed=9), randn(q.shape[0], q.shape[2], q.shape[1], seed=10)
    seen = keep.any(-1).expand(q.shape[0], q.shape[2], -1)
    assert empty or seen.all()
    results = {}
    for name, cast in (("ours", q.dtype), ("expected", torch.float64), ("baseline", q.dtype)):
        leaves = [x.detach().to(cast).requires_grad_() for x in inputs]
        if name == "ours":
            leaves = [x.detach().requires_grad_() for x in inputs]  # with their strides
            out, lse = hhattn.block_sparse_attention(*leaves, mask, scale=scale, return_lse=True)
        else:
            out, lse = dense_formula(*leaves, keep, scale)
        loss = (out * upstream[0].to(cast)).sum() + (lse * upstream[1].to(lse.dtype))[seen].sum()
        results[name] = [out, lse, *(g.nan_to_num() for g in torch.autograd.grad(loss, leaves))]
    for i, part in enumerate(("out", "lse", "dq", "dk", "dv")):
        ours, expected, baseline = (results[n][i] for n in ("ours", "expected", "baseline"))
        assert_close_to_fp64(ours, expected, baseline, factor=2 if i < 2 else 3, ulps=8, name=part)


@pytest.mark.usefixtures("impl", "poisoned_empty")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("b", "sq", "sk", "h", "h_kv", "d", "dv"),
    [(1, 70, 70, 2, 2, 40, 40), (2, 33, 95, 4, 2, 64, 24), (1, 1, 50, 1, 1, 112, 112), (1, 65, 65, 3, 1, 256, 16)],
)
def test_forward_and_gradients(
    dtype: torch.dtype, b: int, sq: int, sk: int, h: int, h_kv: int, d: int, dv: int
) -> None:
    keep = random_keep(1, 1, sq, sk)
    keep[..., 0] = True
    shapes = [(b, sq, h, d), (b, sk, h_kv, d), (b, sk, h_kv, dv)]
    compare_with_formula(keep, (32, 16), [randn(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)])


@pytest.mark.usefixtures("isa", "poisoned_empty")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("block_size", "d", "dv"), [((64, 128), 64, 64), ((24, 200), 33, 7), ((7, 5), 16, 48), ((128, 16), 3, 80)], ids=str
)
def test_every_instruction_set(dtype: torch.dtype, block_size: tuple[int, int], d: int, dv: int) -> None:
    """Blocks full, partial, smaller than a vector and larger than what is taken at once; a mask for each batch entry
    and head, heads that share keys, rows that attend nothing, strided inputs."""
    keep = random_keep(2, 4, 150, 230, share=0.2)
    keep[:, :, :128, :200] = keep[0, 0, :128, :1]  # rows all kept or all masked, so that blocks can be full
    keep[1, :, :64, :128] = True
    keep[:, 1, 140:] = False
    shapes = [(2, 150, 4, d), (2, 230, 2, d), (2, 230, 2, dv)]
    inputs = [strided(randn(*shape, dtype=dtype, seed=i)) for i, shape in enumerate(shapes)]
    compare_with_formula(keep, block_size, inputs, empty=True)


@pytest.mark.usefixtures("impl", "poisoned_empty")
@pytest.mark.parametrize(
    ("block_size", "tokens"), [((64, 128), (70, 150)), ((24, 40), (50, 47)), ((7, 5), (12, 13))], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_of_any_size(
    block_size: tuple[int, int], tokens: tuple[int, int], dtype: torch.dtype, impl: str
) -> None:
    """Full and partial blocks, some cut into tiles that don't divide them; a mask for each batch entry and head, heads
    that share keys, rows that attend nothing, strided inputs."""
    keep = random_keep(2, 2, *tokens, share=0.4)
    keep[:, :, : block_size[0], : block_size[1]] = True
    keep[:, 1, tokens[0] // 2 :] = keep[:, 1, tokens[0] // 2 :, :1]
    d, dv = (16, 24) if impl == "cuda" else (12, 20)
    shapes = [(2, tokens[0], 2, d), (2, tokens[1], 1, d), (2, tokens[1], 1, dv)]
    inputs = [strided(randn(*shape, dtype=dtype, seed=i)) for i, shape in enumerate(shapes)]
    compare_with_formula(keep, block_size, inputs, empty=True)


def test_equals_sdpa_with_a_dense_mask(single: torch.dtype) -> None:
    q, k, v = (randn(2, 90, 3, 32, dtype=single, seed=i) for i in range(3))
    mask = BlockMask.from_blocks(
        torch.ones(1, 1, 2, 2, dtype=torch.bool, device=DEVICE), block_size=(64, 64), q_len=90, k_len=90
    )
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    rtol, atol = (1e-5, 1e-6) if single == torch.float32 else (1e-3, 5e-4)  # an ulp of numbers below 1
    torch.testing.assert_close(hhattn.block_sparse_attention(q, k, v, mask), expected, rtol=rtol, atol=atol)


def test_gradcheck_with_lse() -> None:
    keep = random_keep(1, 2, 9, 11, share=0.5)
    keep[:, :, 4] = False
    keep[:, :, 5] = True
    mask = BlockMask.from_dense(keep, block_size=(4, 8))
    leaves = [randn(1, n, 2, 5, dtype=torch.float64, seed=i).requires_grad_() for i, n in enumerate((9, 11, 11))]

    def f(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = hhattn.block_sparse_attention(q, k, v, mask, return_lse=True)
        return out, lse[:, :, keep[0].any(-1).all(0)]  # an empty row's lse is -inf and has no gradient to check

    assert torch.autograd.gradcheck(f, leaves)


def test_empty_rows_give_zero_minus_infinity_and_no_gradient(single: torch.dtype) -> None:
    keep = random_keep(1, 1, 40, 40)
    keep[..., 7, :] = False
    keep[..., 32:, :] = False  # a whole block of rows
    q, k, v = (randn(1, 40, 2, 16, dtype=single, seed=i).requires_grad_() for i in range(3))
    out, lse = hhattn.block_sparse_attention(q, k, v, BlockMask.from_dense(keep, block_size=(8, 8)), return_lse=True)
    empty = ~keep[0, 0].any(-1)
    assert (out[:, empty] == 0).all()
    assert (lse[:, :, empty] == -math.inf).all()
    assert lse[:, :, ~empty].isfinite().all()
    dq, dk, dv = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert (dq[:, empty] == 0).all()
    assert all(g.isfinite().all() for g in (dq, dk, dv))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_what_stands_at_masked_positions_does_not_matter(poison: float, single: torch.dtype) -> None:
    keep = random_keep(1, 1, 50, 60, share=0.6)
    keep[..., [3, 40]] = False
    mask = BlockMask.from_dense(keep, block_size=(16, 16))
    q, k, v = (randn(1, n, 2, 8, dtype=single, seed=i) for i, n in enumerate((50, 60, 60)))
    clean = [x.clone().requires_grad_() for x in (q, k, v)]
    k[:, [3, 40]], v[:, [3, 40]] = poison, poison
    dirty = [x.clone().requires_grad_() for x in (q, k, v)]
    outs = [hhattn.block_sparse_attention(*x, mask) for x in (clean, dirty)]
    torch.testing.assert_close(outs[1], outs[0])
    grads = [torch.autograd.grad(o.sum(), x) for o, x in zip(outs, (clean, dirty), strict=True)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(b, a)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_what_one_query_must_not_see_another_may(poison: float, single: torch.dtype) -> None:
    """A poisoned value or upstream gradient reaches whatever attends it and leaves the others of its block alone."""
    keep = random_keep(1, 1, 40, 48, share=0.6)
    keep[..., :3, 5] = True
    mask = BlockMask.from_dense(keep, block_size=(16, 16))
    q, k, v = (randn(1, n, 2, 8, dtype=single, seed=i) for i, n in enumerate((40, 48, 48)))
    clean = hhattn.block_sparse_attention(q, k, v, mask)
    v[:, 5] = poison
    out = hhattn.block_sparse_attention(q, k, v, mask)
    sees = keep[0, 0, :, 5]
    torch.testing.assert_close(out[:, ~sees], clean[:, ~sees])
    expected = torch.full_like(out[:, sees], poison)
    torch.testing.assert_close(out[:, sees], expected, equal_nan=True)
    leaves = [x.requires_grad_() for x in (q, *(randn(1, 48, 2, 8, dtype=single, seed=i) for i in (1, 2)))]
    upstream = randn(1, 40, 2, 8, dtype=single, seed=3)
    grads = torch.autograd.grad(hhattn.block_sparse_attention(*leaves, mask), leaves, upstream)
    upstream[:, 7] = poison
    poisoned = torch.autograd.grad(hhattn.block_sparse_attention(*leaves, mask), leaves, upstream)
    attended, others = keep[0, 0, 7], torch.arange(40, device=DEVICE) != 7
    torch.testing.assert_close(poisoned[0][:, others], grads[0][:, others])
    for ours, without in zip(poisoned[1:], grads[1:], strict=True):
        torch.testing.assert_close(ours[:, ~attended], without[:, ~attended])
        assert not ours[:, attended].isfinite().any()


def test_masks_by_batch_and_head_with_grouped_keys() -> None:
    keep = random_keep(2, 6, 50, 30)
    keep[1, 2, 16:32] = False
    inputs = [randn(2, n, h, 12, seed=i) for i, (n, h) in enumerate(((50, 6), (30, 2), (30, 2)))]
    compare_with_formula(keep, (16, 8), inputs, empty=True)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_equals_flex_attention() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    layout = hhattn.VideoLayout(3, 5, 7, tile=(1, 2, 3))
    how = {"block_size": (32, 16)}
    mask = on_device(lambda: masks.sliding_tile(layout, (3, 1, 2), **how) | masks.sink(layout, 1, **how))
    q, k, v = (randn(1, layout.seq_len, 2, 16, seed=i) for i in range(3))
    expected = flex_attention(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask.to_flex())
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(hhattn.block_sparse_attention(q, k, v, mask).transpose(1, 2), expected)


def test_strided_inputs_scale_and_lse() -> None:
    keep = random_keep(2, 3, 37, 41)
    keep[..., 0] = True
    mask = BlockMask.from_dense(keep, block_size=(16, 32))
    q, k, v = (randn(2, n, 3, 24, seed=i) for i, n in enumerate((37, 41, 41)))
    out, lse = hhattn.block_sparse_attention(*(strided(x) for x in (q, k, v)), mask, scale=0.3, return_lse=True)
    expected, expected_lse = dense_formula(q.double(), k.double(), v.double(), keep, 0.3)
    baseline, baseline_lse = dense_formula(q, k, v, keep, 0.3)
    assert_close_to_fp64(out, expected, baseline)
    assert lse.dtype == torch.float32
    assert_close_to_fp64(lse, expected_lse, baseline_lse)


@pytest.mark.parametrize("scale", [-0.7, 0.0, 1e-46])  # the last is 0 in float32
def test_a_scale_may_be_negative_or_zero(scale: float, single: torch.dtype) -> None:
    keep = random_keep(1, 1, 9, 20)
    keep[..., :16] = True  # a full block
    inputs = [randn(1, n, 1, 8, dtype=single, seed=i) for i, n in enumerate((9, 20, 20))]
    compare_with_formula(keep, (9, 16), inputs, scale=scale)


def test_order_is_converted() -> None:
    layout = hhattn.VideoLayout(3, 7, 9, tile=(1, 4, 4))
    raster, tiles = (
        on_device(lambda order=order: masks.sliding_tile(layout, (3, 1, 3), block_size=(16, 16), order=order))
        for order in ("raster", "tile")
    )
    q, k, v = (randn(1, layout.seq_len, 2, 16, seed=i) for i in range(3))
    expected = hhattn.block_sparse_attention(q, k, v, raster)
    torch.testing.assert_close(hhattn.block_sparse_attention(q, k, v, tiles, order="raster"), expected)
    moved = hhattn.block_sparse_attention(*(layout.to_tiles(x) for x in (q, k, v)), tiles)
    torch.testing.assert_close(layout.from_tiles(moved), expected)


@pytest.mark.cpu_only("threads are the CPU's")
@pytest.mark.parametrize("d", [16, 12])
def test_the_same_bits_on_any_number_of_threads(d: int) -> None:
    mask = BlockMask.from_dense(random_keep(1, 1, 400, 400), block_size=(16, 16))
    leaves = [randn(2, 400, 2, d, seed=i).requires_grad_() for i in range(3)]
    before = torch.get_num_threads()
    results = []
    for threads in (1, 3, 3):
        torch.set_num_threads(threads)
        out, lse = hhattn.block_sparse_attention(*leaves, mask, return_lse=True)
        results.append((out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), leaves)))
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_compiles_as_one_graph_and_under_autocast() -> None:
    mask = BlockMask.from_dense(random_keep(1, 1, 48, 48), block_size=(16, 16))
    leaves = [randn(1, 48, 2, 16, seed=i).requires_grad_() for i in range(3)]

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return hhattn.block_sparse_attention(q * 2, k, v, mask).square().sum()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(f(*leaves), leaves)
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        torch.testing.assert_close(a, b)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert hhattn.block_sparse_attention(*leaves, mask).dtype == torch.bfloat16


def test_derivatives_without_a_rule_are_refused() -> None:
    """Forward mode would take the derivative for zero."""
    mask = BlockMask.from_dense(random_keep(1, 1, 8, 8), block_size=(4, 4))
    q = randn(1, 8, 1, 4)

    def run(q: Tensor) -> Tensor:
        return hhattn.block_sparse_attention(q, q, q, mask).sum()

    for take in (lambda: torch.func.jvp(run, (q,), (q,)), lambda: torch.func.grad(run)(q)):
        with pytest.raises(RuntimeError, match=r"block_sparse_attention: .* no rule for torch\.func"):
            take()
    assert torch.func.vmap(run)(torch.stack((q, 2 * q))).shape == (2,)


def test_gradients_of_some_inputs_alone(single: torch.dtype) -> None:
    """The same bits as together with the others."""
    mask = BlockMask.from_dense(random_keep(1, 1, 20, 30), block_size=(8, 16))
    q, k, v = (randn(1, n, 2, 8, dtype=single, seed=i) for i, n in enumerate((20, 30, 30)))

    def gradients(*wanted: bool) -> list[Tensor]:
        leaves = [x.detach().requires_grad_(want) for x, want in zip((q, k, v), wanted, strict=True)]
        out = hhattn.block_sparse_attention(*leaves, mask)
        return list(torch.autograd.grad(out.square().sum(), [x for x in leaves if x.requires_grad]))

    dq, dk, dv = gradients(True, True, True)
    for wanted, expected in (((1, 0, 0), [dq]), ((0, 1, 0), [dk]), ((0, 0, 1), [dv]), ((1, 0, 1), [dq, dv])):
        for ours, value in zip(gradients(*map(bool, wanted)), expected, strict=True):
            torch.testing.assert_close(ours, value, rtol=0, atol=0)


def test_a_second_derivative_is_refused(single: torch.dtype) -> None:
    """A graph may be made of the gradient, which is then a constant of it, but not differentiated as if it were."""
    mask = BlockMask.from_dense(random_keep(1, 1, 8, 8), block_size=(4, 4))
    q = randn(1, 8, 1, 8, dtype=single).requires_grad_()
    (first,) = torch.autograd.grad(hhattn.block_sparse_attention(q, q, q, mask).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="block_sparse_attention: a gradient made with create_graph=True is"):
        torch.autograd.grad(first.square().sum(), q)


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(impl: str) -> None:
    mask = BlockMask.from_dense(random_keep(1, 1, 6, 9), block_size=(8, 8))
    q, k, v = (randn(1, n, 2, 8, seed=i).requires_grad_() for i, n in enumerate((6, 9, 9)))
    names = ("kv_num_blocks", "kv_indices", "kv_tiles", "full_kv_num_blocks", "full_kv_indices", "tiles")
    lists = [getattr(mask, name) for name in names]
    hhattn.block_sparse_attention(q, k, v, mask)  # registers the operators
    name = "block_sparse_attention" + ("_reference" if impl == "reference" else "")
    operators = torch.ops.hhattn_triton if impl == "triton" else torch.ops.hhattn
    forward, backward = (getattr(operators, name + end).default for end in ("", "_backward"))
    torch.library.opcheck(forward, (q, k, v, *lists, 8, 0.3))
    out, lse = forward(q, k, v, *lists, 8, 0.3)
    tensors = [x.detach() for x in (randn(1, 6, 2, 8), randn(1, 2, 6), q, k, v, out, lse)]
    torch.library.opcheck(backward, (*tensors, *lists, 8, 0.3))


@settings(max_examples=40, deadline=None)
@given(
    sq=st.integers(1, 70),
    sk=st.integers(1, 70),
    bq=st.sampled_from([4, 16, 24]),
    bk=st.sampled_from([8, 16, 40]),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_any_shape_and_mask(sq: int, sk: int, bq: int, bk: int, share: float, seed: int) -> None:
    keep = random_keep(1, 2, sq, sk, share=share, seed=seed)
    q, k, v = (randn(1, n, 2, 8, seed=seed + i) for i, n in enumerate((sq, sk, sk)))
    out, lse = hhattn.block_sparse_attention(q, k, v, BlockMask.from_dense(keep, block_size=(bq, bk)), return_lse=True)
    expected, expected_lse = dense_formula(q, k, v, keep)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.cpu_only("arguments are refused before their device matters")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": torch.zeros(1, 8, 3, 4)}, "heads"),
        ({"k": torch.zeros(1, 9, 2, 4)}, "k"),
        ({"impl": "cuda"}, "cuda"),
        ({"mask": torch.ones(8, 8, dtype=torch.bool)}, "BlockMask"),
        ({"scale": float("nan")}, "scale must be a finite number"),
        ({"scale": "a"}, "scale must be a finite number"),
    ],
)
def test_refusals_name_the_argument(change: dict[str, object], words: str) -> None:
    arguments = {name: torch.zeros(1, 8, 2, 4, device=DEVICE) for name in ("q", "k", "v")}
    keep = torch.ones(1, 1, 8, 8, dtype=torch.bool, device=DEVICE)
    call = arguments | {"mask": BlockMask.from_dense(keep, block_size=(8, 8))}
    with pytest.raises((ValueError, TypeError, RuntimeError), match=words):
        hhattn.block_sparse_attention(**(call | change))


PEAK_OF_A_CLIP = """
import sys, torch, hhattn
status = lambda: open("/proc/self/status")  # getrusage counts what the process that started this one holds
peak = lambda: next(int(line.split()[1]) for line in status() if line.startswith("VmHWM")) // 1024
def run(frames):
    layout = hhattn.VideoLayout(frames, 23, 40)
    mask = hhattn.masks.sliding_tile(layout, (3, 3, 3), order="tile")
    q, k, v = (torch.randn(1, layout.seq_len, 1, 32, requires_grad=True) for _ in range(3))
    before = peak()
    out = hhattn.block_sparse_attention(q, k, v, mask, order="raster")
    out.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))
    return layout.seq_len, peak() - before
run(1)  # code that is loaded at the first use
print(*run(int(sys.argv[1])))
"""


@pytest.mark.cpu_only("a process's peak is the CPU's memory")
@pytest.mark.parametrize("frames", [16, pytest.param(64, marks=pytest.mark.slow)])
def test_a_long_clip_never_makes_sq_by_sk(frames: int) -> None:
    """Forward and backward in a process of their own, whose peak tells. Scores of 16 frames would take 867 MB."""
    run = subprocess.run(
        [sys.executable, "-c", PEAK_OF_A_CLIP, str(frames)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HHATTN_IMPL": "reference"},
    )
    tokens, megabytes = (int(n) for n in run.stdout.split())
    assert tokens == frames * 920
    # steps of bounded size, and some twenty arrays of S x 32 floats: inputs, outputs and gradients in two orders
    assert megabytes < 120 + 20 * tokens * 32 * 4 / 2**20, f"{megabytes} MB for {tokens} tokens"
