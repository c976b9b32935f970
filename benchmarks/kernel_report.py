"""Compile every Triton kernel as real models launch it, for A100, H100 and B200, and say what the compiled code is like
and what a model of these GPUs predicts for it. Needs no GPU; measures nothing.

    python benchmarks/kernel_report.py                  write docs/kernels.md
    python benchmarks/kernel_report.py --json FILE      and the figures as JSON
    python benchmarks/kernel_report.py --op OP          print one op's tables, write nothing
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import sass
import torch
from gpu_model import GPUS, PIPES, Gpu, Occupancy, Prediction, Work
from kernel_cases import Case, cases
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from compile_only import Compiled, Launch

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "kernels.md"


@dataclass
class Row:
    """One kernel of one call on one GPU. ``loop`` is one run of the hot loop that takes the most time, by a block: its
    instructions, and the clocks of each pipe; the whole program where there is no loop."""

    op: str
    kernel: str
    model: str
    gpu: str
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


def moved_bytes(launch: Launch) -> int:
    """Bytes of all tensors of a launch, each read or written once; what is shared by stride 0 counts once."""
    total = 0
    for tensor in {id(t): t for t in launch.args if isinstance(t, torch.Tensor)}.values():
        sizes = (n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or n == 0)
        total += math.prod(sizes) * tensor.element_size()
    return total


def execution(instructions: list[sass.Instruction], times: list[float]) -> list[float]:
    """How often a program executes each instruction: those of the i-th hot loop ``times[i]`` times, subroutines of rare
    cases never, all the rest once."""
    counts = [float(reached) for reached in sass.reached(instructions)]
    for loop, count in zip(sass.hot_loops(instructions), times, strict=True):
        for i in loop.body:
            counts[i] = count
    return counts


def examine(case: Case, launch: Launch, compiled: Compiled, gpu: Gpu) -> Row:
    """Everything about one launch."""
    code, hot, problem = compiled.instructions, sass.hot_loops(compiled.instructions), ""
    name = launch.name.strip("_")
    times = list(case.times(launch))
    if len(times) != len(hot):
        problem = f"{len(hot)} hot loops in the code, times of {len(times)} are given"
        times = (times + [times[-1] if times else 1.0] * len(hot))[: len(hot)]
    warps, programs = compiled.threads // 32, math.prod(launch.grid)
    work = Work(code, execution(code, times), warps, programs, moved_bytes(launch))
    everything = [instruction for instruction, there in zip(code, sass.reached(code), strict=True) if there]
    bodies = [[code[i] for i in sorted(loop.body)] for loop in hot] or [everything]
    once = [Work(body, [1.0] * len(body), warps, 1, 0).cycles(gpu) for body in bodies]
    longest = max(range(len(bodies)), key=lambda i: (times or [1.0])[i] * max(once[i].values()))
    return Row(
        op=case.op,
        kernel=case.phase if name == case.phase else f"{case.phase}: {name}",
        model=case.model.name,
        gpu=gpu.name,
        warps=warps,
        programs=programs,
        registers=compiled.usage["REG"],
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
    made = [(case, launch, gpu) for case in chosen for gpu in GPUS.values() for launch in case.launches(gpu.arch)]
    made.sort(key=lambda each: (chosen.index(each[0]), each[1].name))  # a kernel's GPUs together
    progress = track(made, description="compiling", transient=True)
    return [examine(case, launch, launch.compile(gpu.arch), gpu) for case, launch, gpu in progress]


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
    header = "kernel | model | GPU | warps: | registers: | shared KiB: | spills: | blocks an SM: | occupancy: | limit"
    lines = []
    for row in found:
        held = row.occupancy
        first = [row.kernel, row.model, row.gpu, str(row.warps), str(row.registers), number(row.shared / 1024)]
        lines.append([*first, str(row.spills or "–"), str(held.blocks), f"{held.share:.0%}", held.limit])
    return table(header, lines)


def predictions(found: list[Row]) -> list[str]:
    pipes = " | ".join(f"{pipe}:" for pipe in PIPES)
    times = "memory ms: | best ms: | serial ms: | bound by"
    header = f"kernel | model | GPU | instructions: | {pipes} | loop bound by | {times}"
    lines = []
    for row in found:
        p = row.prediction
        loop = [number(row.loop[pipe]) for pipe in PIPES]
        took = [number(seconds * 1e3) for seconds in (p.memory, p.overlapped, p.serial)]
        mark = "*" if row.problem else ""
        lines.append([row.kernel + mark, row.model, row.gpu, str(row.instructions), *loop, row.limit, *took, p.limit])
    return table(header, lines)


def mixes(found: list[Row]) -> list[str]:
    """The instructions of each kernel's loop, for the largest model only."""
    lines = []
    for row in found:
        common = ", ".join(f"{count} {name}" for name, count in list(row.mix.items())[:10])
        lines.append([row.kernel, row.model, row.gpu, common])
    return table("kernel | model | GPU | most frequent instructions of the loop", lines)


def tensor_table(found: list[Row]) -> list[str]:
    header = (
        "kernel | model | GPU | needed TFLOP: | executed / needed: | best TFLOP/s: | serial TFLOP/s: | of the peak:"
    )
    lines = []
    for row in found:
        if row.needed_flops:
            best, serial = (row.needed_flops / t / 1e12 for t in (row.prediction.overlapped, row.prediction.serial))
            peak = next(gpu.tflops for gpu in GPUS.values() if gpu.name == row.gpu)
            share = f"{serial / peak:.0%} to {best / peak:.0%}"
            first = [row.kernel, row.model, row.gpu, number(row.needed_flops / 1e12)]
            lines.append([*first, f"{row.executed_flops / row.needed_flops:.2f}", number(best), number(serial), share])
    return table(header, lines) if lines else []


def sections(found: list[Row]) -> list[str]:
    """A chapter for each op."""
    out = []
    for op in dict.fromkeys(row.op for row in found):
        mine = [row for row in found if row.op == op]
        out += [f"## {op}", "", "What the compiler made:", "", *resources(mine)]
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
    args = parser.parse_args()
    every = cases()
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
