"""What the machine code of every CUDA kernel is made of, kept, so that a change that costs instructions is seen.

    python benchmarks/cuda_counts.py        write tests/cuda_counts.json (make cuda-counts)

`tests/test_compile_only_cuda.py` compares the code with it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import cuda_code
import sass
from gpu_model import access_bytes

SNAPSHOT = Path(__file__).resolve().parents[1] / "tests" / "cuda_counts.json"
ARCHS = ("80", "90a")  # of which the fast tests compile too
TOLERANCE = 0.03
_ACCESSES = ("LDG", "STG", "LDGSTS", "LDS", "STS", "LDL", "STL")
_OTHERS = ("LDSM", "STSM", "SHFL", "BAR", "MUFU", "SYNCS", "UBLKCP", "UTMALDG")


def counts(kernel: cuda_code.Kernel) -> dict[str, int]:
    """Instructions by kind: all, matrix products, accesses by the bytes that a lane moves, and some that cost."""
    found = Counter({"all": len(kernel.instructions)})
    for instruction in kernel.instructions:
        if sass.is_tensor(instruction):
            found["products"] += 1
        elif instruction.name in _ACCESSES:
            found[f"{instruction.name} {access_bytes(instruction)}"] += 1
        elif instruction.name in _OTHERS:
            found[instruction.name] += 1
    return dict(sorted(found.items()))


def compiler() -> str:
    """nvcc's release: another one makes other code."""
    return (re.search(r"release [\d.]+, V[\d.]+", cuda_code.nvcc_version()) or ["?"])[0]


def source_counts(source: Path, arch: str) -> dict[str, dict[str, int]]:
    """Of the kernels that most calls take."""
    found = cuda_code.compiled(source, arch, cuda_code.narrow(source)).kernels
    return {kernel.name: counts(kernel) for kernel in found}


def regressions(before: dict[str, dict[str, int]], now: dict[str, dict[str, int]]) -> list[str]:
    """What costs more than in the snapshot, beyond a few in a hundred, and what it doesn't know."""
    worse = [f"{name}: not in the snapshot" for name in now if name not in before]
    worse += [f"{name}: in the snapshot only" for name in before if name not in now]
    for name in before.keys() & now.keys():
        for kind, count in now[name].items():
            allowed = before[name].get(kind, 0)
            if count > allowed * (1 + TOLERANCE) + 1 or (count and not allowed):
                worse.append(f"{name}: {count} {kind}, {allowed} in the snapshot")
    return sorted(worse)


def main() -> None:
    found = {
        f"{source.name} sm_{arch}": dict(sorted(source_counts(source, arch).items()))
        for source in cuda_code.sources()
        for arch in ARCHS
        if arch in cuda_code.archs(source)
    }
    kernels = ",\n".join(
        f" {json.dumps(key)}: {{\n"
        + ",\n".join(f"  {json.dumps(name)}: {json.dumps(made)}" for name, made in each.items())
        + "\n }"
        for key, each in found.items()
    )
    SNAPSHOT.write_text(f'{{"nvcc": {json.dumps(compiler())}, "sources": {{\n{kernels}\n}}}}\n')
    print(f"{SNAPSHOT.name}: {sum(map(len, found.values()))} kernels")


if __name__ == "__main__":
    main()
