"""Timing that holds on a busy machine: contenders take turns; what counts is the median of each round's ratios."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

ROUNDS = 20


@dataclass
class Case:
    """One shape: contenders by name ("hhattn" among them), the bytes the op must move, and a check run before
    timing."""

    label: str
    contenders: dict[str, Callable[[], object]]
    moved_bytes: int
    check: Callable[[], None]


def options(description: str) -> argparse.Namespace:
    """The options every benchmark takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds: shows that it runs")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA GPU here")
    torch.set_num_threads(args.threads)
    args.dtype = getattr(torch, args.dtype)
    args.rounds = 3 if args.quick else args.rounds
    return args


def _seconds(function: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def copy_contender(moved_bytes: int, device: str) -> Callable[[], Tensor]:
    """``copy_`` of as many bytes as the op must move, half of them read and half written: the memory's own speed."""
    source = torch.zeros(max(moved_bytes // 8, 1), device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def measure(case: Case, args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each contender and of a copy, round by round. The check comes first: a wrong result is not timed."""
    case.check()
    contenders = {**case.contenders, "copy_": copy_contender(case.moved_bytes, args.device)}
    for function in contenders.values():  # compile, fill caches
        function()
        function()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(args.rounds):
        for name, function in contenders.items():
            times[name].append(_seconds(function, args.device))
    return times


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def report(title: str, cases: list[Case], args: argparse.Namespace) -> None:
    """Print a table: milliseconds (median), GB/s of the bytes that must move, and time over hhattn's (median,
    quartiles)."""
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    dtype = str(args.dtype).removeprefix("torch.")
    table = Table(title=f"{title}: {dtype}, {where}, {args.rounds} interleaved rounds")
    for column in ("shape", "", "ms", "GB/s", "time / hhattn's", "quartiles"):
        table.add_column(column, justify="left" if column in ("shape", "") else "right")
    for case in cases:
        times = measure(case, args)
        for name, values in times.items():
            ratios = [a / b for a, b in zip(values, times["hhattn"], strict=True)]
            low, middle, high = _quartiles(ratios)
            median = statistics.median(values)
            speed = f"{case.moved_bytes / median / 1e9:.1f}"
            table.add_row(case.label, name, f"{median * 1e3:.2f}", speed, f"{middle:.2f}", f"{low:.2f} to {high:.2f}")
        table.add_section()
    Console(width=max(Console().width, 110)).print(table)
