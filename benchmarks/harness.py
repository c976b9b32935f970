"""Timing that holds on a busy machine: contenders take turns; what counts is the median of each round's ratios.

Freed memory is kept for all contenders alike, so that what is timed is their own work. Otherwise the system zeroes
every large output anew, page by page, which costs more than most element-wise ops and drowns what they differ in.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hhattn._memory import keep_freed_memory

ROUNDS = 20
MM = 2048  # the product that stands for the machine's own speed


@dataclass
class Case:
    """One shape: contenders by name, "hhattn" among them, and a check run before timing.

    The limit is a copy of the ``moved_bytes`` that the op can't do without, or else a float32 matrix product, whose
    speed is compared by ``flops``, the operations that the op executes. ``goals`` are least values of the last column
    of the table, by the name in its row.
    """

    label: str
    contenders: dict[str, Callable[[], object]]
    check: Callable[[], None]
    moved_bytes: int = 0
    flops: int = 0
    goals: dict[str, float] = field(default_factory=dict)
    other_work: dict[str, int] = field(default_factory=dict)  # of contenders that execute another number of operations

    @property
    def work(self) -> int:
        return self.flops or self.moved_bytes

    @property
    def unit(self) -> str:
        return "GFLOPS" if self.flops else "GB/s"


def options(description: str, dtypes: tuple[str, ...] = ("float32", "bfloat16")) -> argparse.Namespace:
    """The options every benchmark takes; ``dtypes`` are measured unless ``--dtype`` names others."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", nargs="+", default=dtypes, choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds: shows that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the figures to this file, one object a line")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA GPU here")
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    torch._dynamo.config.recompile_limit = 64  # every shape is compiled for itself, as its peer deserves
    args.dtypes = [getattr(torch, name) for name in args.dtype]
    args.rounds = 3 if args.quick else args.rounds
    return args


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def seconds(function: Callable[[], object], device: str) -> float:
    """The time of one call: of the work on the GPU where it runs there, of the wall clock on a CPU."""
    if device == "cuda":
        return cuda_seconds(function, rounds=1, warmup=0)[0]
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def cuda_seconds(function: Callable[[], object], rounds: int = ROUNDS, warmup: int = 5) -> list[float]:
    """The time that each call's work takes on the GPU, by events in its stream.

    Before each, what the L2 cache holds is displaced, as between the layers of a model; that also keeps the GPU busy
    while the host prepares the call, so that the host's own time isn't measured unless it is the longer.
    """
    for _ in range(warmup):
        function()
    displaced = torch.empty(4 * torch.cuda.get_device_properties().L2_cache_size // 4, dtype=torch.int32, device="cuda")
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        displaced.zero_()
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return times


def limit(case: Case, device: str) -> tuple[str, Callable[[], Tensor], int]:
    """Name, function and work of what bounds the op: ``copy_`` of the bytes that must move, half of them read and half
    written, or ``torch.mm``."""
    if case.flops:
        a, b = (torch.randn(MM, MM, device=device) for _ in range(2))
        return "torch.mm", lambda: torch.mm(a, b), 2 * MM**3
    source = torch.zeros(max(case.moved_bytes // 8, 1), device=device)
    target = torch.zeros_like(source)
    return "copy_", lambda: target.copy_(source), case.moved_bytes


def measure(case: Case, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row of figures for each contender and the limit. The check comes first: a wrong result is not timed."""
    case.check()
    bound, function, bound_work = limit(case, args.device)
    contenders = {**case.contenders, bound: function}
    for function in contenders.values():  # compile, fill caches
        function()
        function()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(args.rounds):
        for name, function in contenders.items():
            times[name].append(seconds(function, args.device))
    rows = []
    counted = {"hhattn": case.work, bound: bound_work} | case.other_work
    for name, values in times.items():
        work = counted.get(name, case.work)
        ratios = [a / b * case.work / work for a, b in zip(values, times["hhattn"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        median = statistics.median(values)
        row: dict[str, Any] = {"case": case.label, "name": name, "ms": median * 1e3, "unit": case.unit}
        # what operations a peer executes isn't known
        row["speed"] = work / median / 1e9 if name in counted or not case.flops else None
        row |= {"ratio": middle, "low": low, "high": high, "goal": case.goals.get(name)}
        rows.append(row)
    return rows


def report(title: str, cases: list[Case], args: argparse.Namespace) -> None:
    """Print a table: milliseconds (median), speed, hhattn's speed over the other's (median, quartiles), and the goal
    where there is one."""
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    table = Table(title=f"{title}: {where}, {args.rounds} interleaved rounds")
    for column in ("shape", "", "ms", "speed", "hhattn's speed / its", "quartiles", "goal"):
        table.add_column(column, justify="left" if column in ("shape", "") else "right")
    for case in cases:
        for i, row in enumerate(measure(case, args)):
            label = "" if i else case.label
            speed = "" if row["speed"] is None else f"{row['speed']:.1f} {row['unit']}"
            verdict = "" if row["goal"] is None else f"{row['goal']:.2f} {'✓' if row['ratio'] >= row['goal'] else '✗'}"
            spread = f"{row['low']:.2f} to {row['high']:.2f}"
            table.add_row(label, row["name"], f"{row['ms']:.2f}", speed, f"{row['ratio']:.2f}", spread, verdict)
            if args.json:
                with args.json.open("a") as file:
                    file.write(json.dumps({"benchmark": title, "where": where} | row) + "\n")
        table.add_section()
    Console(width=max(Console().width, 120)).print(table)
