"""What `make gpu` runs: on a machine with a CUDA GPU its measured rooflines, the ops' tests on it and the benchmarks;
on one without, a line that says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from harness import cuda_seconds
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
SIDE = 8192  # of the matrix products
COPIED = 1 << 30  # bytes read, and as many written


def rooflines() -> None:
    """Print the speeds that bound everything else: a copy in memory, matrix products in each dtype."""
    table = Table(title=f"{torch.cuda.get_device_name()}: measured rooflines (median, quartiles)")
    for column in ("", "ms", "speed", "quartiles of ms"):
        table.add_column(column, justify="right" if column else "left")

    def row(name: str, times: list[float], work: float, unit: str) -> None:
        low, middle, high = torch.tensor(times).quantile(torch.tensor([0.25, 0.5, 0.75])).mul(1e3).tolist()
        table.add_row(name, f"{middle:.3f}", f"{work / middle * 1e3 / 1e12:.2f} {unit}", f"{low:.3f} to {high:.3f}")

    source = torch.empty(COPIED // 4, device="cuda")
    target = torch.empty_like(source)
    row("copy", cuda_seconds(lambda: target.copy_(source)), 2 * COPIED, "TB/s")
    kinds = [(torch.float32, False), (torch.float32, True), (torch.float16, False), (torch.bfloat16, False)]
    before = torch.backends.cuda.matmul.allow_tf32
    for dtype, tf32 in kinds:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a, b = (torch.randn(SIDE, SIDE, device="cuda", dtype=dtype) for _ in range(2))
        name = "tf32" if tf32 else str(dtype).removeprefix("torch.")
        row(f"matmul, {name}", cuda_seconds(lambda a=a, b=b: torch.mm(a, b)), 2 * SIDE**3, "TFLOP/s")
    torch.backends.cuda.matmul.allow_tf32 = before
    Console(width=100).print(table)


def main() -> int:
    if not torch.cuda.is_available():
        print(
            f"make gpu: no CUDA GPU here (torch {torch.__version__}, built for CUDA {torch.version.cuda}); nothing was "
            "run. On a GPU machine: make gpu TORCH=torch"
        )
        return 0
    rooflines()
    command = [Path(sys.executable).with_name("pytest"), "-m", "any_device and not slow"]
    tests = subprocess.run(command, cwd=ROOT, env={**os.environ, "HHATTN_TEST_DEVICE": "cuda"}, check=False)
    bench = subprocess.run([sys.executable, ROOT / "benchmarks/run.py", "--device", "cuda"], check=False)
    return tests.returncode or bench.returncode


if __name__ == "__main__":
    sys.exit(main())
