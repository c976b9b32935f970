"""Compile every Triton and CUDA kernel as real models launch it, for A100, H100 and B200, and say what the compiled
code is like and what a model of these GPUs predicts for it. Needs no GPU; measures nothing. CUDA's need nvcc.

    python benchmarks/kernel_report.py                  write docs/kernels.md
    python benchmarks/kernel_report.py --json FILE      and the figures as JSON
    python benchmarks/kernel_report.py --op OP          print one op's tables, write nothing
    python benchmarks/kernel_report.py --cuda OP        of its CUDA kernels only, which is quicker
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cuda_cases
import cuda_code
import kernel_cases
import sass
from gpu_model import GPUS, PIPES, Gpu, Occupancy, Prediction, Work
from kernel_cases import Case
from rich.progress import track

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "kernels.md"


@dataclass
class Row:
    """One kernel of one call on one GPU, launched ``launches`` times. ``loop`` is one run of the hot loop that takes
    the most time, by a block: its instructions, and the clocks of each pipe; the whole program where there is none."""

    op: str
    phase: str
    kernel: str
    by: str
    model: str
    gpu: str
    launches: int
    warps: int
    programs: int
    registers: int
    shared: int
    spills: int
    occupancy: Occupancy
    instructions: int
    mix: dict[str, int]
    loop: dict[str, float]
    prediction: Prediction
    executed_flops: float
    needed_flops: float
    problem: str = ""

    @property
    def limit(self) -> str:
        """The pipe that holds the loop up."""
        return max(self.loop, key=lambda pipe: self.loop[pipe])


def runs(instructions: list[sass.Instruction], rare: float = 1.0, inner: float | None = None) -> list[dict[int, float]]:
    """One run of each hot loop: how often it executes each of its instructions, ``rare`` times what branches usually
    leave out. With ``inner`` it is a run of the loop around, in which the hot loop is run so many times."""
    found = []
    for loop in sass.hot_loops(instructions):
        run = {i: 1.0 if i in loop.usual else rare for i in loop.body}
        if inner is not None:
            outer = (other for other in sass.loops(instructions) if loop.body < other.body)
            around = min(outer, key=lambda other: len(other.body))
            outside = {i: 1.0 if i in around.usual else rare for i in around.body}
            run = outside | {i: n * inner for i, n in run.items()}
        found.append(run)
    return found


def execution(
    instructions: list[sass.Instruction], times: list[float], rare: float = 1.0, inner: float | None = None
) -> list[float]:
    """How often a program executes each instruction: those of the i-th run ``times[i]`` times, subroutines of rare
    cases never, all the rest once."""
    counts = [float(reached) for reached in sass.reached(instructions)]
    for run, count in zip(runs(instructions, rare, inner), times, strict=True):
        for i, n in run.items():
            counts[i] = count * n
    return counts


def examine(case: Case, launch: Any, compiled: Any, gpu: Gpu, launches: int = 1) -> Row:
    """Everything about one launch: its programs, its code, and how long that holds each pipe."""
    code, problem, inner = compiled.instructions, "", case.inner(launch)
    hot = runs(code, case.rare, inner)
    name = launch.name.strip("_")
    times = list(case.times(launch))
    if len(times) != len(hot):
        problem = f"{len(hot)} hot loops in the code, times of {len(times)} are given"
        times = (times + [times[-1] if times else 1.0] * len(hot))[: len(hot)]
    warps, programs = case.warps(launch) or compiled.threads // 32, math.prod(launch.grid)
    copied = case.copied(launch)
    executed = execution(code, times, case.rare, inner)
    work = Work(code, executed, warps, programs, case.moved_bytes(launch), copied * max(times, default=0.0))
    everything = {i: 1.0 for i, there in enumerate(sass.reached(code)) if there}
    hot = hot or [everything]
    bodies = [[code[i] for i in sorted(run)] for run in hot]
    once = [Work([code[i] for i in run], list(run.values()), warps, 1, 0, copied).cycles(gpu) for run in hot]
    longest = max(range(len(bodies)), key=lambda i: (times or [1.0])[i] * max(once[i].values()))
    return Row(
        op=case.op,
        phase=case.phase,
        by=case.by,
        launches=launches,
        kernel=case.phase if name == case.phase else f"{case.phase}: {name}",
        model=case.model.name,
        gpu=gpu.name,
        warps=compiled.threads // 32,
        programs=programs,
        registers=compiled.registers,
        shared=compiled.shared,
        spills=compiled.spills,
        occupancy=compiled.occupancy(),
        instructions=len(bodies[longest]),
        mix=dict(Counter(i.name for i in bodies[longest]).most_common()),
        loop=once[longest],
        prediction=work.predict(gpu),
        executed_flops=work.flops,
        needed_flops=case.flops(launch),
        problem=problem,
    )


def rows(chosen: list[Case]) -> list[Row]:
    """All figures."""
    made = [(case, *one, gpu) for case in chosen for gpu in GPUS.values() for one in case.counted(gpu.arch)]
    made.sort(key=lambda each: (chosen.index(each[0]), each[1].name))  # a kernel's GPUs together
    progress = track(made, description="compiling", transient=True)
    return [examine(case, launch, launch.compile(gpu.arch), gpu, n) for case, launch, n, gpu in progress]


def cases() -> list[Case]:
    """Every call; those of CUDA kernels where nvcc is."""
    return [*kernel_cases.cases(), *(cuda_cases.cases() if cuda_code.nvcc() else [])]


def table(header: str, lines: list[list[str]]) -> list[str]:
    """A table in Markdown; a column whose heading ends in ``:`` is aligned to the right."""
    names = [name.strip() for name in header.split("|")]
    rule = ["---:" if name.endswith(":") else "---" for name in names]
    body = [[name.rstrip(":") for name in names], rule, *lines]
    return ["| " + " | ".join(line) + " |" for line in body] + [""]


def number(x: float) -> str:
    """Three digits."""
    if x == 0:
        return "–"
    return f"{x:.0f}" if x >= 99.5 else f"{x:.3g}"


def resources(found: list[Row]) -> list[str]:
    header = (
        "kernel | by | model | GPU | warps: | registers: | shared KiB: | spills: | blocks an SM: | occupancy: | limit"
    )
    lines = []
    for row in found:
        held = row.occupancy
        first = [row.kernel, row.by, row.model, row.gpu, str(row.warps), str(row.registers)]
        lines.append(
            [
                *first,
                number(row.shared / 1024),
                str(row.spills or "–"),
                str(held.blocks),
                f"{held.share:.0%}",
                held.limit,
            ]
        )
    return table(header, lines)


def predictions(found: list[Row]) -> list[str]:
    pipes = " | ".join(f"{pipe}:" for pipe in PIPES)
    times = "memory ms: | best ms: | serial ms: | bound by"
    header = f"kernel | by | model | GPU | instructions: | {pipes} | loop bound by | {times}"
    lines = []
    for row in found:
        p = row.prediction
        loop = [number(row.loop[pipe]) for pipe in PIPES]
        took = [number(seconds * 1e3) for seconds in (p.memory, p.overlapped, p.serial)]
        mark = "*" if row.problem else ""
        first = [row.kernel + mark, row.by, row.model, row.gpu, str(row.instructions)]
        lines.append([*first, *loop, row.limit, *took, p.limit])
    return table(header, lines)


def mixes(found: list[Row]) -> list[str]:
    """The instructions of each kernel's loop, for the largest model only."""
    lines = []
    for row in found:
        common = ", ".join(f"{count} {name}" for name, count in list(row.mix.items())[:10])
        lines.append([row.kernel, row.by, row.model, row.gpu, common])
    return table("kernel | by | model | GPU | most frequent instructions of the loop", lines)


def tensor_table(found: list[Row]) -> list[str]:
    speeds = "best TFLOP/s: | serial TFLOP/s: | of the peak:"
    header = f"kernel | by | model | GPU | needed TFLOP: | executed / needed: | {speeds}"
    lines = []
    for row in found:
        if row.needed_flops:
            best, serial = (row.needed_flops / t / 1e12 for t in (row.prediction.overlapped, row.prediction.serial))
            peak = next(gpu.tflops for gpu in GPUS.values() if gpu.name == row.gpu)
            share = f"{serial / peak:.0%} to {best / peak:.0%}"
            first = [row.kernel, row.by, row.model, row.gpu, number(row.needed_flops / 1e12)]
            lines.append([*first, f"{row.executed_flops / row.needed_flops:.2f}", number(best), number(serial), share])
    return table(header, lines) if lines else []


def beside(found: list[Row]) -> list[str]:
    """CUDA beside Triton: of each call the times of all its launches; nothing where only one of them has kernels."""
    calls: dict[tuple[str, str, str], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in found:
        calls[row.phase, row.model, row.gpu][row.by].append(row)
    lines = []
    for call, rows in calls.items():
        if len(rows) < 2:
            continue
        best, serial = (
            {
                by: sum(row.launches * getattr(row.prediction, how) for row in each) * 1e3
                for by, each in sorted(rows.items())
            }
            for how in ("overlapped", "serial")
        )
        ratios = [times["CUDA"] / times["Triton"] for times in (best, serial)]
        lines.append([*call, *(number(t) for times in (best, serial) for t in times.values()), *map(number, ratios)])
    header = (
        "call | model | GPU | CUDA best ms: | Triton best ms: | CUDA serial ms: | Triton serial ms: | best: | serial:"
    )
    return ["CUDA beside Triton, all launches of a call:", "", *table(header, lines)] if lines else []


def sections(found: list[Row]) -> list[str]:
    """A chapter for each op."""
    out = []
    for op in dict.fromkeys(row.op for row in found):
        mine = [row for row in found if row.op == op]
        out += [f"## {op}", "", *beside(mine), "What the compilers made:", "", *resources(mine)]
        out += [
            "Clocks of one run of the loop, and times of the launch, **predicted, uncalibrated, never measured**:",
            "",
        ]
        out += predictions(mine)
        products = tensor_table(mine)
        if products:
            out += ["Matrix products:", "", *products]
        out += ["What the loop is made of:", "", *mixes([row for row in mine if row.model == mine[0].model])]
        problems = {f"\\* {row.kernel}, {row.model}, {row.gpu}: {row.problem}" for row in mine if row.problem}
        out += [line for problem in sorted(problems) for line in (problem, "")]
    return out


def page(found: list[Row]) -> str:
    """The whole of docs/kernels.md."""
    text = (Path(__file__).parent / "kernel_report.md").read_text()
    header = (
        "GPU | code for | SMs: | clock GHz: | bf16 TFLOP/s: | memory TB/s: | multiply-adds: | by mma.sync: | float32:"
    )
    lines = []
    for gpu in GPUS.values():
        first = [gpu.name, f"sm_{gpu.arch}", str(gpu.sms), f"{gpu.ghz:.2f}", f"{gpu.tflops:g}", f"{gpu.bandwidth:g}"]
        lines.append([*first, str(gpu.mma), str(gpu.mma_sync), str(gpu.fp32)])
    gpus = table(header, lines)
    return text.replace("{gpus}\n\n", "\n".join(gpus) + "\n") + "\n" + "\n".join(sections(found)).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file too")
    parser.add_argument("--op", help="print this op's tables and write no page")
    parser.add_argument("--cuda", metavar="OP", help="print the tables of this op's CUDA kernels and write no page")
    args = parser.parse_args()
    every = cases()
    if args.cuda:
        args.op = args.cuda
        every = [case for case in every if case.by == "CUDA"]
    if args.op and args.op not in {case.op for case in every}:
        parser.error(f"--op {args.op}: accepted: {', '.join(sorted({case.op for case in every}))}")
    found = rows([case for case in every if args.op in (None, case.op)])
    if args.json:
        args.json.write_text(json.dumps([dataclasses.asdict(row) for row in found], indent=1) + "\n")
    if args.op:
        print("\n".join(sections(found)))
    else:
        PAGE.write_text(page(found))
        print(f"{PAGE.relative_to(ROOT)}: {len(found)} kernels, models and GPUs")


if __name__ == "__main__":
    main()
