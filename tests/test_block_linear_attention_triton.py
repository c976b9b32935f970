"""The Triton kernels of block_linear_attention in Triton's interpreter or on a GPU: every map and option, and chunks of
pieces."""

from __future__ import annotations

import pytest
import torch
from helpers import DEVICE
from linear_oracle import EVERY, compare, inputs, options, to

from hhattn import block_linear_attention
from hhattn.ops import _triton

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.any_device,
    pytest.mark.skipif(
        DEVICE == "cpu" and not _triton.interpreted(), reason="needs Triton's interpreter, TRITON_INTERPRET=1, or a GPU"
    ),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16][: 2 + (DEVICE != "cpu")]  # the interpreter is wrong on the last


@pytest.fixture
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 16 tokens, so that chunks of some dozens have several."""
    monkeypatch.setattr(_triton.kernels("block_linear_attention"), "PIECE", 16)


@pytest.mark.usefixtures("poisoned_empty", "short_pieces")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("sizes", "chunk_lens"),
    [((2, 50, 2, 1, 40, 24), 37), ((1, 66, 1, 1, 16, 112), [1, 32, 33]), ((1, 35, 3, 3, 6, 5), None)],
    ids=str,
)
def test_everything_at_once(dtype: torch.dtype, sizes: tuple[int, ...], chunk_lens: object) -> None:
    """Groups of heads, pieces and tiles cut short, dims that fill no vector, strides, and every option."""
    compare("triton", dtype, sizes, chunk_lens, EVERY, eps=1e-3)


@pytest.mark.parametrize(("dim", "dim_v"), [(112, 112), (130, 80), (2, 1)])
def test_head_dims(dim: int, dim_v: int) -> None:
    """Values of several tiles, and dims below the least product."""
    compare("triton", torch.float32, (1, 21, 1, 1, dim, dim_v), 16, {"rope"}, eps=1e-3)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    "maps", [("relu", None), ("elu1", None), ("relu2", "relu"), ("softmax", "softmax"), ("relu", "identity")], ids=str
)
def test_every_map(maps: tuple[str, str | None], normalize: bool) -> None:
    how = {"feature_map": maps[0], "numerator_map": maps[1], "normalize": normalize, "eps": 1e-3}
    compare("triton", torch.float32, (1, 20, 2, 1, 20, 10), 16, {"rope", "decay"}, **how)


def test_keys_as_they_come_are_exact_in_float16() -> None:
    """ReLU without rotation and gate: keys go into one product, in their own dtype."""
    compare("triton", torch.float16, (1, 40, 1, 1, 16, 16), 16, set(), eps=1e-3)


@pytest.mark.usefixtures("short_pieces")
def test_equal_lengths_need_no_list() -> None:
    """A list of equal chunks is what their length is, to the bit; and a list of other chunks has other sums."""
    q, k, v = (x.float() for x in inputs(1, 50, 1, 1, 8, 8))
    results = [
        block_linear_attention(q, k, v, chunk_lens=lens, impl="triton") for lens in (20, [20, 20, 10], [20, 10, 20])
    ]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_large_sums_of_float16_stay_in_range() -> None:
    """The state is beyond float16's largest number, and what is divided by it below its least."""
    k = torch.full((1, 64, 1, 16), 100.0, dtype=torch.float16, device=DEVICE)
    q, k, v = (x.clone().requires_grad_() for x in (k, k, k))
    out, state = block_linear_attention(q, k, v, output_final_state=True, impl="triton")
    assert state.kv.min() == 64 * 100.0**2 > torch.finfo(torch.float16).max
    torch.testing.assert_close(out, torch.full_like(out, 100.0))
    for grad in torch.autograd.grad(out.sum(), (q, k, v)):
        assert grad.isfinite().all()


@pytest.mark.parametrize("names", [set(), {"rope", "key_gate"}], ids=["plain", "rope+gate"])
def test_opcheck(names: set[str]) -> None:
    q, k, v = (x.float().requires_grad_() for x in inputs(1, 12, 1, 1, 8, 6))
    extra = {n: to(x, torch.float32) for n, x in options(1, 12, 1, 8, 6, 2, names).items()}
    gate, tables = extra.get("key_gate"), extra.get("rope", (None, None))
    ops, how = torch.ops.hhattn_triton, (*tables, 6, [], 0, 0)
    torch.library.opcheck(ops.block_linear_sums.default, (k, v, gate, *how))
    kv, k_sum = (x.detach().requires_grad_() for x in ops.block_linear_sums(k, v, gate, *how))
    torch.library.opcheck(ops.block_linear_outputs.default, (q, kv, k_sum, *how, True, 1e-3))
    out = ops.block_linear_outputs(q, kv, k_sum, *how, True, 1e-3)
    fixed = [x.detach() for x in (kv, k_sum, k, v)]
    torch.library.opcheck(ops.block_linear_sums_backward.default, (*fixed, gate, *how))
    fixed = [x.detach() for x in (out, q, kv, k_sum, out)]
    torch.library.opcheck(ops.block_linear_outputs_backward.default, (*fixed, *how, True, 1e-3))
