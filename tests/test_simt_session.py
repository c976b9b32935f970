"""Emulated launches see each tensor alone: what lies beyond its end is no other's, whatever lies there."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import hhattn
from hhattn import simt
from hhattn.ops import _triton

pytestmark = pytest.mark.skipif(_triton.interpreted(), reason="the interpreter runs no PTX")


def test_a_store_beyond_the_output_is_reported_though_a_neighbour_lies_there() -> None:
    """Every store of the norm's kernel, moved by the size of its output."""
    x = torch.ones(1, 4, 64)

    def beyond(kernel: str, ptx: str) -> str:
        return "\n".join(
            line.replace("+ 0 ]", f"+ {x.nbytes} ]") if "st.global" in line else line for line in ptx.split("\n")
        )

    for rewrite, found in ((None, False), (beyond, True)):
        with simt.emulate(rewrite=rewrite) as session:
            y = hhattn.norm_modulate(x, impl="triton")
        assert any(r.kind == "global-oob" for r in session.reports) == found, session.reports
        if not found:
            y = y[0] if isinstance(y, tuple) else y
            torch.testing.assert_close(y, torch.ones_like(x), rtol=1e-4, atol=1e-4)


def test_a_launch_that_is_not_what_its_ptx_takes_is_refused() -> None:
    x = torch.ones(1, 4, 64)

    def narrower(kernel: str, ptx: str) -> str:
        return ptx.replace(".param .u64 _forward", ".param .u32 _forward", 1)

    def fewer(kernel: str, ptx: str) -> str:
        head, _, tail = ptx.partition("\n)\n")
        return head.rpartition(",")[0] + "\n)\n" + tail

    for rewrite, words in ((narrower, "takes x_batch as u32, the launch gives u64"), (fewer, "parameters, the launch")):
        with simt.emulate(rewrite=rewrite), pytest.raises(ValueError, match=words):
            hhattn.norm_modulate(x, impl="triton")
