"""Faults of block_sparse_attention's Hopper kernel: two warpgroups, a ring that goes round, full and partial blocks."""

from __future__ import annotations

import torch
from helpers import randn, strided
from test_block_sparse_attention import random_keep

from cuda_faults import NUMBERS, Fault, Run
from cuda_faults.block_sparse_attention import check_forward

SHAPE = ("HH_ONE_SHAPE=hh::bf16,64,128,2",)


def forward(poison: float | None = None) -> None:
    """Six blocks of keys for four stages of the ring, and one; scores that grow, so that sums are scaled anew."""
    sq, sk, block = 150, 760, (128, 128)
    keep = random_keep(1, 2, sq, sk, share=0.5)
    keep[..., 128:384] = keep[..., :1]  # full blocks, where the first query block and head allow
    keep[0, 0, :128, 128:384] = True
    keep[:, 1, :64] = False
    keep[..., 5] = False
    q, k, v = (
        strided(randn(1, *shape, dtype=torch.bfloat16, seed=i))
        for i, shape in enumerate([(sq, 2, 64), (sk, 1, 64), (sk, 1, 64)])
    )
    k *= torch.linspace(0.2, 6, sk)[:, None, None].to(k)
    check_forward(keep, block, [q, k, v], poison)


def poisoned() -> None:
    """A value that nobody attends is infinite."""
    forward(torch.inf)


RUNS = {"forward": Run(forward, SHAPE, arch=90), "poisoned": Run(poisoned, SHAPE, arch=90)}

KERNEL, ROWS, PTX = "block_sparse_attention_sm90.cu", "block_sparse_rows_sm90.cuh", "ptx_sm90.cuh"
WAIT = """    if (moved) {  // a wait in each branch: behind one in line with softmax the assembler would move all of it
      ptx::wgmma_wait<0>(o);
      scale_rows(o, keep);
    } else {
      ptx::wgmma_wait<0>(o);
    }
"""
FAULTS = [
    Fault("values given back before the product with them", "forward", "race", KERNEL,
          "    ptx::pin(s);\n" + WAIT + "    give_back(at.v_free(before.stage));\n",
          "    ptx::pin(s);\n    give_back(at.v_free(before.stage));\n" + WAIT),
    Fault("scores read before they are there", "forward", "wgmma-pending", KERNEL,
          "ptx::wgmma_wait<1>(s);", "ptx::wgmma_wait<2>(s);"),
    Fault("sums scaled while products add to them", "forward", "wgmma-pending", KERNEL,
          "      ptx::wgmma_wait<0>(o);\n      scale_rows(o, keep);",
          "      scale_rows(o, keep);\n      ptx::wgmma_wait<0>(o);"),
    Fault("weights packed into registers that a product reads", "forward", "async-source", KERNEL,
          "    ptx::pin(s);\n", "    pack<T>(p, s);\n"),
    Fault("registers not handed over", "forward", "wgmma-no-fence", KERNEL,
          "    ptx::wgmma_fence();\n    scores(s, q, at.k(turn.stage));",
          "    scores(s, q, at.k(turn.stage));"),
    Fault("values not waited for", "forward", "async-pending", KERNEL,
          "    ptx::mbarrier_wait(at.v_full(before.stage), before.parity);\n    ptx::mbarrier_wait(at.k_full",
          "    ptx::mbarrier_wait(at.k_full"),
    Fault("a barrier told of fewer bytes than come", "forward", "deadlock", KERNEL,
          "ptx::mbarrier_expect(at.v_full(stage), S::TILE_BYTES);",
          "ptx::mbarrier_expect(at.v_full(stage), S::TILE_BYTES / 2);"),
    Fault("a stage filled without its being free", "forward", "mbarrier", KERNEL,
          "    ptx::mbarrier_wait(at.k_free(stage), turn.parity ^ 1);\n", ""),
    Fault("one warpgroup gives a stage back for both", "forward", "async-source", KERNEL,
          "ptx::mbarrier_init(at.k_free(i), 4 * S::GROUPS);", "ptx::mbarrier_init(at.k_free(i), 4);"),
    Fault("rows of out read before all lanes wrote theirs", "forward", "race", KERNEL,
          "  __syncwarp();\n  constexpr int CHUNKS", "  constexpr int CHUNKS"),
    Fault("eights of lines taken to be closer", "forward", NUMBERS, PTX,
          "uint64_t(1024 >> 4) << 32", "uint64_t(512 >> 4) << 32"),
    Fault("bits of the next row", "forward", NUMBERS, ROWS, "++r, line += m.bk)", "++r, line += m.bk / 8)"),
    Fault("former sums not scaled", "forward", NUMBERS, KERNEL, "      scale_rows(o, keep);\n", ""),
    Fault("two registers of a product's operand swapped", "forward", NUMBERS, ROWS,
          "p[i / 4][i % 4] =", "p[i / 4][i % 4 ^ 1] ="),
    Fault("rows with what isn't finite left as they are", "poisoned", NUMBERS, KERNEL,
          "  if (!(again[0] | again[1])) return;", "  return;"),
]  # fmt: skip
