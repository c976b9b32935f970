"""sparse_linear_attention in torch: threads, compilation, autocast, memory, derivatives, and what is refused."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import IMPLS
from helpers import DEVICE, randn
from test_sparse_linear_attention import impl as impl
from test_sparse_linear_attention import random_classes, whole
from torch import Tensor

import hhattn
from hhattn import BlockMask

pytestmark = pytest.mark.any_device


@pytest.mark.cpu_only("threads are the CPU's")
@pytest.mark.parametrize("impl", ["cpp"])
def test_the_same_bits_on_any_number_of_threads(impl: str) -> None:
    classes = random_classes(1, 1, 200, 200, block=(16, 16), tokens=0.1)
    pair = [BlockMask.from_dense(x, block_size=(16, 16)) for x in classes]
    leaves = [randn(2, 200, h, 40, seed=i).requires_grad_() for i, h in enumerate((4, 2, 2))]
    before = torch.get_num_threads()
    results = []
    for threads in (1, 3, 3):
        torch.set_num_threads(threads)
        out = hhattn.sparse_linear_attention(*leaves, *pair, impl=impl)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.usefixtures("impl")
@pytest.mark.parametrize("given_marginal", [False, True])
def test_compiles_as_one_graph(given_marginal: bool) -> None:
    classes = random_classes(1, 1, 48, 48, block=(16, 16))
    critical, marginal = (BlockMask.from_dense(x, block_size=(16, 16)) for x in classes)
    leaves = [randn(1, 48, 2, 16, seed=i).requires_grad_() for i in range(3)]
    leaves += [randn(16, 16, seed=4).requires_grad_(), randn(2, seed=5).requires_grad_()]

    def f(q: Tensor, k: Tensor, v: Tensor, proj: Tensor, alpha: Tensor) -> Tensor:
        masks = (critical, marginal if given_marginal else None)
        return hhattn.sparse_linear_attention(q * 2, k, v, *masks, proj=proj, alpha=alpha).square().sum()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(f(*leaves), leaves)
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast() -> None:
    q, k, v = (randn(1, 48, 2, 16, seed=i) for i in range(3))
    critical, proj = whole(False, 48, 48, 16), randn(16, 16, seed=4)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = hhattn.sparse_linear_attention(q, k, v, critical, proj=proj, gate=randn(1, 48, 2))
    assert out.dtype == torch.bfloat16
    expected = hhattn.sparse_linear_attention(q, k, v, critical, proj=proj, gate=randn(1, 48, 2))
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("complement", [False, True])
def test_opcheck(impl: str, complement: bool) -> None:
    mask = BlockMask.from_dense(random_classes(1, 1, 6, 9, block=(8, 8), tokens=1)[0], block_size=(8, 8))
    q, k, v = (randn(1, n, 2, 8, seed=i).requires_grad_() for i, n in enumerate((6, 9, 9)))
    names = ("kv_num_blocks", "kv_indices", "kv_tiles", "full_kv_num_blocks", "full_kv_indices", "tiles")
    lists = [getattr(mask, name) for name in names]
    hhattn.sparse_linear_attention(q, k, v, mask)  # registers the operators
    name = "sparse_linear_marginal" + ("_reference" if impl == "reference" else "")
    operators = torch.ops.hhattn_triton if impl == "triton" else torch.ops.hhattn
    forward, backward = (getattr(operators, name + end).default for end in ("", "_backward"))
    how = (8, complement) if impl == "reference" else (8, complement, 2)
    if impl == "reference":
        q, k = (x.detach().exp().requires_grad_() for x in (q, k))
    torch.library.opcheck(forward, (q, k, v, *lists, *how, 1e-15))
    out, den = forward(q, k, v, *lists, *how, 1e-15)
    tensors = [x.detach() for x in (randn(1, 6, 2, 8), q, k, v, out, den)]
    torch.library.opcheck(backward, (*tensors, *lists, *how))


PEAK_OF_A_CLIP = """
import sys, torch, hhattn
status = lambda: open("/proc/self/status")  # getrusage counts what the process that started this one holds
peak = lambda: next(int(line.split()[1]) for line in status() if line.startswith("VmHWM")) // 1024
def run(frames):
    layout = hhattn.VideoLayout(frames, 23, 40)
    mask = hhattn.masks.sliding_tile(layout, (3, 3, 3), order="tile")
    q, k, v = (torch.randn(1, layout.seq_len, 1, 32, requires_grad=True) for _ in range(3))
    before = peak()
    out = hhattn.sparse_linear_attention(q, k, v, mask, order="raster")
    out.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))
    return layout.seq_len, peak() - before
run(1)  # code that is loaded at the first use
print(*run(16))
"""


@pytest.mark.cpu_only("a process's peak is the CPU's memory")
@pytest.mark.parametrize("impl", [pytest.param("reference", marks=pytest.mark.slow), "cpp"])
def test_a_long_clip_never_makes_sq_by_sk(impl: str) -> None:
    """Forward and backward in a process of their own, whose peak tells. Weights of 16 frames would take 867 MB."""
    run = subprocess.run(
        [sys.executable, "-c", PEAK_OF_A_CLIP],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HHATTN_IMPL": impl},
    )
    tokens, megabytes = (int(n) for n in run.stdout.split())
    # steps of bounded size, and some forty arrays of S x 32 floats: inputs, features, outputs and gradients of both
    # branches, in two orders
    assert megabytes < 120 + 40 * tokens * 32 * 4 / 2**20, f"{megabytes} MB for {tokens} tokens"


def test_derivatives_without_a_rule_are_refused() -> None:
    q, critical = randn(1, 8, 1, 4), whole(False, 8, 8, 4)

    def run(q: Tensor) -> Tensor:
        return hhattn.sparse_linear_attention(q, q, q, critical).sum()

    with pytest.raises(RuntimeError, match=r"sparse_linear_attention: .* no rule for torch\.func"):
        torch.func.grad(run)(q)
    mapped = torch.func.vmap(run)(torch.stack((q, 2 * q)))
    torch.testing.assert_close(mapped, torch.stack((run(q), run(2 * q))))


def test_a_second_derivative_is_refused(impl: str) -> None:
    q = randn(1, 8, 1, 4).requires_grad_()
    out = hhattn.sparse_linear_attention(q, q, q, whole(False, 8, 8, 4))
    (first,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="attention: a gradient made with create_graph=True is"):
        torch.autograd.grad(first.square().sum(), q)


@pytest.mark.cpu_only("arguments are refused before their device matters")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"critical": torch.ones(8, 8, dtype=torch.bool)}, "critical must be a hhattn.BlockMask"),
        ({"marginal": torch.ones(8, 8, dtype=torch.bool)}, "marginal must be a hhattn.BlockMask"),
        ({"marginal": whole(True, 8, 9, 8)}, "marginal must be for Sq=8 queries and Sk=8 keys"),
        ({"marginal": whole(True, 8, 8, 4)}, "marginal must have critical's block_size"),
        ({"feature_map": "identity"}, "feature_map='identity' is not accepted"),
        ({"eps": -1.0}, "eps"),
        ({"scale": math.nan}, "scale must be a finite number"),
        ({"proj": torch.zeros(3, 3)}, r"proj must have shape \[Dv, Dv\] or \[H, Dv, Dv\]"),
        ({"alpha": torch.zeros(3)}, "alpha must have shape"),
        ({"alpha": math.inf}, "alpha must be finite"),
        ({"alpha": "half"}, "alpha must be a torch.Tensor"),
        ({"gate": torch.zeros(1, 8, 1)}, "gate must have shape"),
        ({"gate": torch.zeros(1, 8, 2, dtype=torch.int32)}, "gate must have a floating dtype"),
        ({"order": "tile"}, "order"),
        ({"impl": "cuda"}, "cuda"),
    ],
    ids=str,
)
def test_refusals_name_the_argument(change: dict[str, object], words: str) -> None:
    call: dict[str, object] = {name: torch.zeros(1, 8, 2, 4, device=DEVICE) for name in ("q", "k", "v")}
    with pytest.raises((ValueError, TypeError, RuntimeError), match=words):
        hhattn.sparse_linear_attention(**(call | {"critical": whole(True, 8, 8, 8)} | change))
