"""Every CUDA source compiled by nvcc for every architecture, without a GPU: what a block of it takes is there, forward
kernels spill nothing, matrix products are on the tensor cores, rows move 16 bytes at once, and nothing costs more than
in the snapshot (`make cuda-counts`)."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

pytest.importorskip("triton")  # for its cuobjdump

import cuda_cases
import cuda_code
import cuda_counts
import sass
from gpu_model import PARTS, occupancy

pytestmark = pytest.mark.skipif(cuda_code.nvcc() is None, reason="no nvcc here")

FAST = ("80", "90a")
NARROW = [
    pytest.param(source, arch, cuda_code.narrow(source), id=f"{source.stem}-{arch}")
    for source in cuda_code.sources()
    for arch in cuda_code.archs(source)
    if arch in FAST
]
EVERY = [
    pytest.param(source, arch, (), id=f"{source.stem}-{arch}-every", marks=pytest.mark.slow)
    for source in cuda_code.sources()
    for arch in cuda_code.archs(source)
]
#: Local accesses of backward kernels that are known; of forward kernels there are none.
SPILLS: dict[str, int] = {
    # on sm_100a (dkv: one of two where blocks change) and on sm_120 (dq: none in its loop)
    **{f"block_sparse_attention_backward backward_dkv<DkvShape<{t},128>>": 4 for t in ("bf16", "f16")},
    **{f"block_sparse_attention_backward backward_dq<DqShape<{t},112>>": 6 for t in ("bf16", "f16")},
    # sums for modulation and parameters at once, or of more than 5120 channels: rare
    **{f"norm_modulate_backward norm_modulate_pieces<{vec},16,(Sums)2>": 400 for vec in (1, 4, 8)},
    **{f"norm_modulate_backward norm_modulate_pieces<{vec},8,(Sums)2>": 100 for vec in (1, 4, 8)},
    # float32 heads: under one norm a block is large, else two are allowed
    **{
        f"qk_norm_rope_backward norm_rope_pieces<4,{vectors},{halves},1>": 100
        for vectors in (0, 1)
        for halves in (0, 1)
    },
    "qk_norm_rope_backward norm_rope_pieces<4,1,0,0>": 4,
    **{f"norm_modulate_backward norm_modulate_pieces<{vec},8,(Sums)0>": 15 for vec in (4, 8)},  # on sm_120 alone
}
# the code for every map and unaligned rows
SPILLS |= {
    f"block_linear_attention_backward linear_gradients<{type_},{dim},(Kind)0>": 30
    for type_ in ("bf16", "f16")
    for dim in (112, 128)
}
#: Dynamic shared memory that launches may ask for (csrc/cuda/launch.cuh): with all of it a block fits.
EVERYWHERE, HOPPER = 99 << 10, 227 << 10
#: Sources that multiply matrices, and by what.
PRODUCTS = {"block_sparse_attention": "HMMA", "block_sparse_attention_sm90": "HGMMA", "block_linear_attention": "HMMA"}


@pytest.mark.parametrize(("source", "arch", "defines"), NARROW + EVERY)
def test_the_code_is_what_it_should_be(source: Path, arch: str, defines: tuple[str, ...]) -> None:
    """The kernels that most calls take, and, slowly, all of them."""
    code = cuda_code.compiled(source, arch, defines)
    assert code.kernels
    for kernel in code.kernels:
        where = f"{kernel.name} for sm_{arch}"
        spills = SPILLS.get(f"{source.stem} {kernel.name}", 0) if source.stem.endswith("_backward") else 0
        assert kernel.spills <= spills, f"{where}: {kernel.spills} accesses of local memory"
        assert kernel.threads, f"{where}: no __launch_bounds__, so the compiler doesn't know what registers there are"
        assert kernel.static == 0, f"{where}: {kernel.static} bytes of static shared memory"
        most = HOPPER if source.stem.endswith("_sm90") else EVERYWHERE
        assert kernel.occupancy(kernel.threads, most).blocks >= 1, f"{where}: {kernel.registers} registers"
    serial = [line for line in code.warnings if "serializ" in line.lower()]
    assert not serial, serial
    stem = source.stem.removesuffix("_backward")
    if stem in PRODUCTS:
        opcodes = {i.opcode for kernel in code.kernels for i in kernel.instructions if sass.is_tensor(i)}
        assert opcodes
        assert all(opcode.startswith(PRODUCTS[stem]) for opcode in opcodes), opcodes
    wide = sum(kernel.count(r"(LDG|LDGSTS)\..*\b128\b|UBLKCP|UTMALDG") for kernel in code.kernels)
    assert wide, "no load of 16 bytes"


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="launches are recorded by the emulator")
@pytest.mark.parametrize("arch", [80, 86, 90, 100, 120])
def test_launches_of_real_models_fit(arch: int) -> None:
    """Threads and shared memory of a block, as host code asks for them."""
    for case in cuda_cases.cases():
        launches = case.launches({86: 80, 120: 100}.get(arch, arch))
        assert launches, f"{case.op} {case.phase}"
        for launch in launches:
            x, y, z = launch.recorded.block
            held = occupancy(PARTS[arch], 32, launch.recorded.shared, x * y * z)
            assert held.blocks >= 1, f"{launch.plain}: {launch.recorded.shared} bytes, {x * y * z} threads"


SNAPSHOT = json.loads(cuda_counts.SNAPSHOT.read_text())


@pytest.mark.parametrize(("source", "arch"), [pytest.param(*one.values[:2], id=one.id) for one in NARROW])
def test_nothing_costs_more_than_in_the_snapshot(source: Path, arch: str) -> None:
    if SNAPSHOT["nvcc"] != cuda_counts.compiler():
        pytest.skip(f"the snapshot is {SNAPSHOT['nvcc']}'s, this is {cuda_counts.compiler()}: make cuda-counts")
    before = SNAPSHOT["sources"].get(f"{source.name} sm_{arch}", {})
    worse = cuda_counts.regressions(before, cuda_counts.source_counts(source, arch))
    assert not worse, "\n".join([*worse, "if that is meant: make cuda-counts"])


def test_a_regression_is_one() -> None:
    before = {"k": {"all": 1000, "LDG 16": 8}, "gone": {"all": 9}}
    same = {"k": {"all": 1030, "LDG 16": 8}, "gone": {"all": 2}}
    assert not cuda_counts.regressions(before, same)
    worse = {"k": {"all": 1032, "LDG 16": 10, "LDG 2": 1}, "new": {"all": 9}}
    assert cuda_counts.regressions(before, worse) == [
        "gone: in the snapshot only",
        "k: 1 LDG 2, 0 in the snapshot",
        "k: 10 LDG 16, 8 in the snapshot",
        "k: 1032 all, 1000 in the snapshot",
        "new: not in the snapshot",
    ]


def test_kinds_are_counted() -> None:
    source = Path(__file__).parent / "simt" / "gates.cu"
    found = cuda_counts.source_counts(source, "80")
    assert found["copy"] == {
        "all": len(cuda_code.compiled(source, "80").kernels[-1].instructions),
        "LDG 16": 1,
        "STG 16": 1,
    }
    assert found["products<4,0>"]["products"] == 4
    assert found["spilling"]["STL 4"] + found["spilling"].get("STL 16", 0) > 20
    assert cuda_counts.compiler().startswith("release ")
