"""The GPU kernels of block_linear_attention, Triton's (in its interpreter or on a GPU) and CUDA's (on the emulator or a
GPU): every map and option, and chunks of pieces."""

from __future__ import annotations

import sys

import pytest
import torch
from helpers import DEVICE
from linear_oracle import EVERY, compare, inputs, options, to

from hhattn import block_linear_attention
from hhattn.ops import _triton

pytestmark = pytest.mark.any_device
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
IMPLS = ["triton", "cuda"]
RUNS = [("triton", F32), ("triton", F16), ("triton", BF16), ("cuda", F16), ("cuda", BF16)]
ONE_EACH = [("triton", F32), ("cuda", BF16)]
if DEVICE == "cpu":
    RUNS.remove(("triton", BF16))  # Triton's interpreter computes wrongly with it


@pytest.fixture
def short_pieces(monkeypatch: pytest.MonkeyPatch, impl: str) -> None:
    """Triton's pieces of 16 tokens, so that chunks of some dozens have several; CUDA's have a test of their own."""
    if impl == "triton":
        monkeypatch.setattr(_triton.kernels("block_linear_attention"), "PIECE", 16)


@pytest.mark.usefixtures("poisoned_empty", "short_pieces")
@pytest.mark.parametrize(("impl", "dtype"), RUNS, ids=str)
@pytest.mark.parametrize(
    ("sizes", "chunk_lens"),
    [((2, 50, 2, 1, 40, 24), 37), ((1, 66, 1, 1, 16, 112), [1, 32, 33]), ((1, 35, 3, 3, 6, 5), None)],
    ids=str,
)
def test_everything_at_once(impl: str, dtype: torch.dtype, sizes: tuple[int, ...], chunk_lens: object) -> None:
    """Groups of heads, pieces and tiles cut short, dims that fill no vector, strides, and every option."""
    compare(impl, dtype, sizes, chunk_lens, EVERY, eps=1e-3)


@pytest.mark.parametrize(("impl", "dtype"), ONE_EACH, ids=str)
@pytest.mark.parametrize(("dim", "dim_v"), [(112, 112), (130, 80), (64, 128), (2, 1)])
def test_head_dims(impl: str, dtype: torch.dtype, dim: int, dim_v: int) -> None:
    """Values of several tiles, and dims below the least product."""
    if impl == "cuda" and dim > 128:
        with pytest.raises(RuntimeError, match="q has a head dim of 130; cuda takes up to 128"):
            compare(impl, dtype, (1, 21, 1, 1, dim, dim_v), 16, {"rope"}, eps=1e-3)
    else:
        compare(impl, dtype, (1, 21, 1, 1, dim, dim_v), 16, {"rope"}, eps=1e-3)


@pytest.mark.parametrize(("impl", "dtype"), ONE_EACH, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    "maps", [("relu", None), ("elu1", None), ("relu2", "relu"), ("softmax", "softmax"), ("relu", "identity")], ids=str
)
def test_every_map(impl: str, dtype: torch.dtype, maps: tuple[str, str | None], normalize: bool) -> None:
    how = {"feature_map": maps[0], "numerator_map": maps[1], "normalize": normalize, "eps": 1e-3}
    compare(impl, dtype, (1, 20, 2, 1, 20, 10), 16, {"rope", "decay"}, **how)


@pytest.mark.parametrize(("impl", "dtype"), ONE_EACH, ids=str)
def test_rows_far_below_zero(impl: str, dtype: torch.dtype) -> None:
    """exp(0 - the row's maximum) is infinite: channels that aren't there must not be mapped as zeros are."""
    compare(impl, dtype, (1, 20, 1, 1, 40, 24), 16, {"rope"}, shift=-100.0, feature_map="softmax", eps=1e-3)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(("impl", "dtype"), ONE_EACH, ids=str)
def test_chunks_far_longer_than_the_sequence(impl: str, dtype: torch.dtype) -> None:
    compare(impl, dtype, (1, 20, 1, 1, 16, 16), sys.maxsize, {"key_gate"}, eps=1e-3)


@pytest.mark.parametrize(("impl", "dtype"), [("triton", F16), ("cuda", F16), ("cuda", BF16)], ids=str)
def test_keys_as_they_come_are_exact(impl: str, dtype: torch.dtype) -> None:
    """ReLU without rotation and gate: keys go into the product with their own bits."""
    compare(impl, dtype, (1, 40, 1, 1, 16, 16), 16, set(), eps=1e-3)


@pytest.mark.parametrize("impl", ["triton"])
@pytest.mark.usefixtures("short_pieces")
def test_equal_lengths_need_no_list(impl: str) -> None:
    """A list of equal chunks is what their length is, to the bit; and a list of other chunks has other sums."""
    q, k, v = (x.float() for x in inputs(1, 50, 1, 1, 8, 8))
    results = [block_linear_attention(q, k, v, chunk_lens=lens, impl=impl) for lens in (20, [20, 20, 10], [20, 10, 20])]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("impl", IMPLS)
def test_large_sums_of_float16_stay_in_range(impl: str) -> None:
    """The state is beyond float16's largest number, and what is divided by it below its least."""
    k = torch.full((1, 64, 1, 16), 100.0, dtype=torch.float16, device=DEVICE)
    q, k, v = (x.clone().requires_grad_() for x in (k, k, k))
    out, state = block_linear_attention(q, k, v, output_final_state=True, impl=impl)
    assert state.kv.min() == 64 * 100.0**2 > torch.finfo(torch.float16).max
    torch.testing.assert_close(out, torch.full_like(out, 100.0))
    for grad in torch.autograd.grad(out.sum(), (q, k, v)):
        assert grad.isfinite().all()


@pytest.mark.parametrize(("impl", "dtype"), ONE_EACH, ids=str)
@pytest.mark.parametrize("names", [set(), {"rope", "key_gate"}], ids=["plain", "rope+gate"])
def test_opcheck(impl: str, dtype: torch.dtype, names: set[str]) -> None:
    q, k, v = (x.to(dtype).requires_grad_() for x in inputs(1, 12, 1, 1, 8, 6))
    extra = {n: to(x, torch.float32) for n, x in options(1, 12, 1, 8, 6, 2, names).items()}
    gate, tables = extra.get("key_gate"), [x[:, ::2].contiguous() for x in extra.get("rope", ())] or (None, None)
    ops, how = getattr(torch.ops, f"hhattn_{impl}"), (*tables, 6, [], 0, 0)
    torch.library.opcheck(ops.block_linear_sums.default, (k, v, gate, *how))
    kv, k_sum = (x.detach().requires_grad_() for x in ops.block_linear_sums(k, v, gate, *how))
    torch.library.opcheck(ops.block_linear_outputs.default, (q, kv, k_sum, *how, True, 1e-3))
    out = ops.block_linear_outputs(q, kv, k_sum, *how, True, 1e-3)
    fixed = [x.detach() for x in (kv, k_sum, k, v)]
    torch.library.opcheck(ops.block_linear_sums_backward.default, (*fixed, gate, *how))
    fixed = [x.detach() for x in (out, q, kv, k_sum, out)]
    torch.library.opcheck(ops.block_linear_outputs_backward.default, (*fixed, *how, True, 1e-3))
