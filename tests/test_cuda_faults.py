"""The tests of CUDA kernels can fail: each fault that is seeded into a source is caught, by the report or the rule of
accuracy that is named beside it, and the same run without it is clean. The faults: `tests/cuda_faults/`."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import cuda_faults
import pytest
from cuda_faults import NUMBERS, Fault, Run

from hhattn import simt
from hhattn.simt.cuda import Kernels

pytestmark = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="the emulator is built with g++")

OPS = cuda_faults.modules()
RUNS = [pytest.param(run, id=f"{op}-{name}") for op in OPS for name, run in cuda_faults.runs(op).items()]
FAULTS = [
    pytest.param(cuda_faults.runs(op)[fault.run], fault, id=f"{op}-{fault.what.replace(' ', '-')}")
    for op in OPS
    for fault in cuda_faults.faults(op)
]


def outcome(run: Run, folder: Path) -> tuple[list[simt.Report], str]:
    """What was reported, and what the accuracy rule says ("" if it holds)."""
    wrong = ""
    with simt.emulate(run.arch, run.seed, cuda=Kernels(folder, run.flags)) as session:
        try:
            run.call()
        except AssertionError as e:
            wrong = str(e) or "an assertion"
    assert session.launches
    return session.reports, wrong


@pytest.mark.parametrize("run", RUNS)
def test_without_faults_nothing_is_reported(run: Run) -> None:
    reports, wrong = outcome(run, cuda_faults.CUDA)
    assert not reports, "\n".join(map(str, reports))
    assert not wrong


@pytest.mark.parametrize(("run", "fault"), FAULTS)
def test_every_fault_is_caught(run: Run, fault: Fault, tmp_path: Path) -> None:
    fault.seed(tmp_path / "cuda")
    reports, wrong = outcome(run, tmp_path / "cuda")
    kinds = {r.kind for r in reports}
    if fault.caught == NUMBERS:
        assert wrong, f"results are right; reported: {kinds or 'nothing'}"
    else:
        assert fault.caught in kinds, f"reported: {kinds or 'nothing'}; results: {wrong or 'right'}"


def test_a_fault_that_does_not_apply_is_refused(tmp_path: Path) -> None:
    for old, times in (("no such text", 0), ("#include", 2)):
        fault = Fault("nothing", "", NUMBERS, "launch.cuh", old, "")
        with pytest.raises(AssertionError, match=r"nothing: stands \d+ times in launch\.cuh"):
            fault.seed(tmp_path / str(times))


def test_the_table_of_faults_is_documented() -> None:
    documented = re.findall(cuda_faults.ROW, cuda_faults.PAGE.read_text(), re.M)
    assert documented == cuda_faults.rows(), "python tests/cuda_faults/__init__.py writes it"
    assert len(set(documented)) == len(documented)
