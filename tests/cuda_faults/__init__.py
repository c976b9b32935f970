"""Faults seeded into CUDA sources, and what each has to be caught by. One module an op, each with

``RUNS``: what is run, by name, and ``FAULTS``: texts of the op's sources, what becomes of them, and who notices.

`python tests/cuda_faults/__init__.py` writes their table in docs/verification.md.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
PAGE = CUDA.parents[1] / "docs" / "verification.md"
ROW = r"^\| .+? \| `csrc/cuda/\S+` \| .+? \|$"  # a line of the table there
NUMBERS = "numbers"  # not the emulator's reports but the accuracy rule finds it


@dataclass(frozen=True)
class Run:
    """A call of an op with ``impl="cuda"`` that raises AssertionError where its results break the accuracy rule.
    ``defines`` leave few instantiations to compile, as the preprocessor's -D takes them."""

    call: Callable[[], None]
    defines: tuple[str, ...] = ()
    arch: int = 80
    seed: int = 1

    @property
    def flags(self) -> tuple[str, ...]:
        return tuple(f"-D{define}" for define in self.defines)


@dataclass(frozen=True)
class Fault:
    """``old`` becomes ``new`` in ``csrc/cuda/FILE``, where it stands exactly once; ``run`` is a key of the module's
    ``RUNS``. ``caught`` is a kind of report, or NUMBERS."""

    what: str
    run: str
    caught: str
    file: str
    old: str
    new: str

    def seed(self, folder: Path) -> None:
        """Make ``folder`` a copy of csrc/cuda with the fault. AssertionError unless ``old`` stands there once."""
        shutil.copytree(CUDA, folder)
        path = folder / self.file
        source = path.read_text()
        assert source.count(self.old) == 1, f"{self.what}: stands {source.count(self.old)} times in {self.file}"
        path.write_text(source.replace(self.old, self.new))


def modules() -> list[str]:
    """The ops that have faults."""
    return sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))


def faults(op: str) -> list[Fault]:
    return importlib.import_module(f"cuda_faults.{op}").FAULTS


def runs(op: str) -> dict[str, Run]:
    return importlib.import_module(f"cuda_faults.{op}").RUNS


def rows() -> list[str]:
    """The table's lines."""
    every = [fault for op in modules() for fault in faults(op)]
    kinds = [fault.caught if fault.caught == NUMBERS else f"`{fault.caught}`" for fault in every]
    return [f"| {f.what} | `csrc/cuda/{f.file}` | {kind} |" for f, kind in zip(every, kinds, strict=True)]


def write_table() -> None:
    """Put the lines in the place of those that docs/verification.md has."""
    text = PAGE.read_text()
    lines = list(re.finditer(ROW, text, re.M))
    PAGE.write_text(text[: lines[0].start()] + "\n".join(rows()) + text[lines[-1].end() :])


if __name__ == "__main__":
    import sys

    sys.path[:0] = [str(Path(__file__).parents[1])]
    import cuda_faults  # the package, not this script: its modules import it

    cuda_faults.write_table()
