"""No native op takes more memory than its results, a little for each token, and tiles for each thread: measured."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import NATIVE_ISAS

pytestmark = pytest.mark.skipif(
    not NATIVE_ISAS or not sys.platform.startswith("linux"), reason="needs the native library and /proc"
)

CASES = {
    "block_sparse_attention": (
        "mask = hhattn.masks.sliding_tile(hhattn.VideoLayout(16, 23, 40), (3, 3, 3), order='tile')",
        "hhattn.block_sparse_attention(x, x, x, mask)",
        1,
    ),
    "block_linear_attention": (
        "rope = hhattn.rope_3d((16, 23, 40), 64)",
        "hhattn.block_linear_attention(x, x, x, rope=rope, chunk_lens=3680)",
        1,
    ),
    "norm_modulate": (
        "m = torch.rand(3, 1, 16, 512)",
        "hhattn.norm_modulate(x.flatten(2), m[0], m[1], residual=x.flatten(2), gate=m[2])[0].view_as(x)",
        2,
    ),
    "qk_norm_rope": (
        "rope = hhattn.rope_3d((16, 23, 40), 64)",
        "hhattn.qk_norm_rope(x, x, *rope)[0]",
        2,
    ),
}
PROGRAM = """
import torch, hhattn
torch.set_num_threads(2)
def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1024
{setup}
x = torch.rand(1, 14720, 8, 64, requires_grad={gradients})
def run():
    out = {call}
    return (out, torch.autograd.grad(out, x, x.detach())) if x.requires_grad else out
small = torch.rand(1, 64, 2, 64)
hhattn.block_linear_attention(small, small, small)
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak starts here
result = run()
print(status("VmHWM") - before)
"""


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("op", CASES)
def test_results_and_tiles(op: str, gradients: bool) -> None:
    """q, k and v are one tensor of 29 MB: autograd adds the three gradients up, so one more sum may be alive."""
    setup, call, results = CASES[op]  # how many tensors as large as x come back
    program = PROGRAM.format(setup=setup, call=call, gradients=gradients)
    env = {**os.environ, "HHATTN_IMPL": "cpp"}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=env)
    assert run.returncode == 0, run.stderr
    results += 4 * gradients
    one = 14720 * 8 * 64 * 4 / 2**20
    # a packed head of keys and values, sums of four chunks, log-sum-exps, two threads' tiles, and code that is loaded
    assert float(run.stdout) < results * one + 16, (
        f"{run.stdout.strip()} MB, where each of {results} results has {one:.0f}"
    )
