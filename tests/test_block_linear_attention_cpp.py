"""The native kernels of block_linear_attention: every instruction set, map and option, any number of threads."""

from __future__ import annotations

import pytest
import torch
from conftest import NATIVE_ISAS
from helpers import randn
from linear_oracle import EVERY, compare, inputs, options, to

from hhattn import block_linear_attention

pytestmark = pytest.mark.skipif(not NATIVE_ISAS, reason="the native library is not built")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.usefixtures("isa", "poisoned_empty")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("sizes", "chunk_lens"),
    [((2, 150, 4, 2, 40, 24), 70), ((1, 130, 2, 2, 16, 112), [1, 64, 65]), ((1, 67, 3, 3, 6, 5), None)],
    ids=str,
)
def test_every_instruction_set(dtype: torch.dtype, sizes: tuple[int, ...], chunk_lens: object) -> None:
    """Groups of heads, tiles cut short, dims that fill no vector, strides, and every option at once."""
    compare("cpp", dtype, sizes, chunk_lens, EVERY, eps=1e-3)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    "maps", [("relu", None), ("elu1", None), ("relu2", "relu"), ("softmax", "softmax"), ("relu", "identity")], ids=str
)
def test_every_map(maps: tuple[str, str | None], normalize: bool) -> None:
    how = {"feature_map": maps[0], "numerator_map": maps[1], "normalize": normalize, "eps": 1e-3}
    compare("cpp", torch.float32, (1, 40, 2, 1, 20, 10), 16, {"rope", "decay"}, **how)


def test_the_same_bits_on_any_number_of_threads() -> None:
    """Chunks of several pieces, whose sums several threads make."""
    q, k, v = (x.float().requires_grad_() for x in inputs(2, 5000, 2, 2, 16, 16))
    before, results = torch.get_num_threads(), []
    for threads in (1, 3, 3):
        torch.set_num_threads(threads)
        out, state = block_linear_attention(q, k, v, chunk_lens=2400, output_final_state=True, impl="cpp")
        results.append((out, *state, *torch.autograd.grad(out.square().sum() + state.kv.sum(), (q, k, v))))
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("names", [set(), {"rope", "key_gate"}], ids=["plain", "rope+gate"])
def test_opcheck(names: set[str]) -> None:
    q, k, v = (x.float().requires_grad_() for x in inputs(1, 20, 2, 2, 8, 6))
    extra = {n: to(x, torch.float32) for n, x in options(1, 20, 2, 8, 6, 4, names).items()}
    gate, tables = extra.get("key_gate"), extra.get("rope", (None, None))
    ops, how = torch.ops.hhattn, (*tables, 6, [], 0, 0)
    torch.library.opcheck(ops.block_linear_sums.default, (k, v, gate, *how))
    kv, k_sum = (x.detach().requires_grad_() for x in ops.block_linear_sums(k, v, gate, *how))
    torch.library.opcheck(ops.block_linear_outputs.default, (q, kv, k_sum, *how, True, 1e-3))
    out = ops.block_linear_outputs(q, kv, k_sum, *how, True, 1e-3)
    fixed = [x.detach() for x in (kv, k_sum, k, v)]
    torch.library.opcheck(ops.block_linear_sums_backward.default, (*fixed, gate, *how))
    fixed = [x.detach() for x in (randn(*out.shape), q, kv, k_sum, out)]
    torch.library.opcheck(ops.block_linear_outputs_backward.default, (*fixed, *how, True, 1e-3))


def test_a_gradient_of_the_tables_is_left_to_the_reference() -> None:
    q, k, v = (x.float() for x in inputs(1, 8, 1, 1, 4, 4))
    cos, sin = (torch.ones(8, 4, requires_grad=True) for _ in range(2))
    out = block_linear_attention(q, k, v, rope=(cos, sin))
    assert torch.autograd.grad(out.sum(), cos)[0].abs().sum() > 0
    with pytest.raises(RuntimeError, match="rope needs a gradient"):
        block_linear_attention(q, k, v, rope=(cos, sin), impl="cpp")
