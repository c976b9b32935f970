"""The emulator's detectors: each fires on a kernel with one fault, and is silent on the same kernel without it."""

import ctypes
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="the emulator is built with g++")
SOURCES = [Path(__file__).parent / "simt" / f"{name}.cu" for name in ("detectors", "detectors_async")]

# kernel -> the kinds of report that its fault may show as, by the schedule; the first is what it is there for
FAULTS = {
    "missing_barrier": ("race",),
    "missing_reuse_barrier": ("race",),
    "missing_warp_sync": ("race",),
    "wrong_named_barrier": ("race", "deadlock"),
    "written_after_arrival": ("race",),
    "half_a_warp_meets": ("race",),
    "one_lane_waits": ("race",),
    "one_lane_arrives": ("race", "uninitialized"),
    "halves": ("race",),
    "halves_of_evens": ("race",),
    "halves_in_place": ("race",),
    "global_halves": ("race",),
    "sum_of_neighbours": ("race",),
    "blocks_write": ("race",),
    "block_reads": ("race",),
    "threads_in_block": ("race",),
    "blocks_store_the_same": ("race",),
    "plain_add": ("race",),
    "uninitialized_shared": ("uninitialized",),
    "stale_output": ("uninitialized",),
    "read_past_end": ("global-oob",),
    "write_before_begin": ("global-oob",),
    "shared_past_end": ("shared-oob",),
    "write_read_only": ("read-only",),
    "misaligned_vector": ("misaligned",),
    "split_barrier": ("divergence",),
    "shuffle_in_branch": ("divergence",),
    "product_in_branch": ("divergence",),
    "missing_arrival": ("deadlock",),
    "inactive_source": ("mask",),
    "endless_poll": ("deadlock",),
    "too_many_threads": ("launch",),
    "weak_wait": ("async-pending", "async-not-waited"),
    "wait_without_barrier": ("race", "async-pending"),
    "never_waited": ("async-not-waited",),
    "bulk_no_wait": ("async-pending", "race", "uninitialized", "mbarrier"),
    "bulk_wrong_parity": ("deadlock", "divergence", "async-pending", "race", "uninitialized"),
    "mbarrier_no_barrier": ("race", "mbarrier"),
    "mbarrier_no_init": ("mbarrier",),
    "mbarrier_wrong_bytes": ("deadlock",),
    "bulk_no_reuse_barrier": ("race", "deadlock", "async-pending"),
    "store_without_fence": ("no-proxy-fence",),
    "store_source_reused": ("async-source",),
    "wgmma_no_wait": ("wgmma-pending",),
    "wgmma_no_fence": ("wgmma-no-fence",),
    "wgmma_no_proxy_fence": ("no-proxy-fence",),
    "wgmma_operand_reused": ("async-source", "race", "no-proxy-fence"),
    "wgmma_left_in_flight": ("async-not-waited",),
    "wgmma_given_back_early": ("race", "async-source"),
    "wgmma_source_overwritten": ("async-source",),
}

# races that a schedule may hide behind another fault, which ends the launch
BY_LUCK = {"mbarrier_no_barrier", "bulk_no_reuse_barrier", "wgmma_given_back_early"}


@pytest.fixture(scope="module")
def kernels():
    from hhattn.simt.runtime import build_cu

    libraries = [build_cu(source) for source in SOURCES]
    return lambda name: next(getattr(library, name) for library in libraries if hasattr(library, name))


@pytest.fixture
def emulator():
    from hhattn.simt.runtime import runtime

    runtime().reset()
    yield runtime()
    runtime().reset()
    runtime().options()


def address(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


def run(kernels, emulator, name, bug, seed):
    from hhattn.simt.runtime import READ_ONLY, READ_WRITE, WRITE_FIRST

    emulator.reset()
    emulator.options(seed=seed)
    x = torch.arange(64 if name == "read_past_end" else 256, dtype=torch.float32) + 1
    y = torch.zeros(256)
    emulator.register(x, "x", READ_ONLY)
    emulator.register(y, "y", WRITE_FIRST if name == "stale_output" else READ_WRITE)
    kernels(f"run_{name}")(int(bug), address(x), address(y))
    return emulator.reports(), y


@pytest.mark.parametrize("name", FAULTS)
def test_detector(kernels, emulator, name):
    kinds = set()
    for seed in range(4):
        reports, _ = run(kernels, emulator, name, True, seed)
        assert reports, f"seed {seed}: nothing was reported"
        assert {r.kind for r in reports} <= set(FAULTS[name])
        found = {r.kind for r in reports}
        kinds |= found
        if FAULTS[name][0] == "race" and name not in BY_LUCK:
            assert "race" in found, f"seed {seed}: {reports[0]}"
        for r in reports:
            assert r.kernel == f"{name}<true>"
            if r.kind != "launch":
                assert Path(r.file) in SOURCES, str(r)
                assert r.line > 0
                assert r.thread >= 0
    assert FAULTS[name][0] in kinds
    for seed in range(4):
        reports, _ = run(kernels, emulator, name, False, seed)
        assert not reports, f"seed {seed}, no fault: {reports[0]}"


def lines(*texts):
    """Line numbers of the first source that hold these texts."""
    source = SOURCES[0].read_text().splitlines()
    return {number for number, line in enumerate(source, 1) if any(t in line for t in texts)}


def test_a_report_names_line_block_and_thread(kernels, emulator):
    reports, _ = run(kernels, emulator, "read_past_end", True, 0)
    (report,) = reports
    assert report.line in lines("(Bug ? 65 : 64)")
    assert (report.block, report.thread, report.count) == ((1, 0, 0), 0, 1)
    assert report.message == "4-byte read in no tensor: 0 bytes past the end of x (256 bytes)"
    assert str(report).endswith("[read_past_end<true>, block (1, 0, 0), thread 0]")


def test_a_report_comes_once_with_a_count(kernels, emulator):
    reports, _ = run(kernels, emulator, "stale_output", True, 0)
    (report,) = reports
    assert report.count == 32
    run_again, _ = run(kernels, emulator, "stale_output", True, 0)
    assert run_again == reports


def test_out_of_bounds_stops_the_launch_before_it_writes(kernels, emulator):
    _, y = run(kernels, emulator, "write_before_begin", True, 0)
    assert not y.any()


@pytest.mark.parametrize("stopped_by", ["ldmatrix_past_end", "wgmma_past_end"])
def test_a_fault_is_reported_after_a_stopped_launch(kernels, emulator, stopped_by):
    """What a warp reads as a whole may end a launch: the next one is checked, and counted, as ever."""
    reports, _ = run(kernels, emulator, stopped_by, True, 0)
    assert {r.kind for r in reports} == {"shared-oob"}
    reports, _ = run(kernels, emulator, "missing_reuse_barrier", True, 0)
    assert {r.kind for r in reports} == {"race"}
    emulator.reset()
    emulator.options(counters=True)
    x, y = torch.zeros(32 * 32), torch.zeros(32)
    emulator.register(x, "x")
    emulator.register(y, "y")
    kernels("run_ldmatrix_past_end")(1, address(x), address(y))
    kernels("run_strides")(address(x), address(y), 1)
    assert any(c.space == "shared" and c.write and c.requests == 1 for c in emulator.counters())


def test_without_checks_nothing_is_reported(kernels, emulator):
    from hhattn.simt.runtime import READ_WRITE

    x, y = torch.arange(256.0), torch.zeros(256)
    emulator.register(x, "x", READ_WRITE)
    emulator.register(y, "y", READ_WRITE)
    emulator.options(checks=False)
    kernels("run_missing_barrier")(1, address(x), address(y))
    assert not emulator.reports()
    assert (y[:63] == 0).any()  # what was there before; lanes run one after another


def tickets(kernels, emulator, seed):
    order, following = torch.zeros(3 * 128 * 2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    emulator.reset()
    emulator.options(seed=seed)
    emulator.register(order, "order")
    emulator.register(following, "next")
    kernels("run_tickets")(address(order), address(following))
    assert not emulator.reports()
    return order.tolist()


def test_seeds_interleave_threads_warps_and_blocks_differently(kernels, emulator):
    plain, *drawn = (tickets(kernels, emulator, seed) for seed in (0, 1, 2))
    assert sorted(plain) == sorted(drawn[0]) == sorted(drawn[1]) == sorted(2 * list(range(384)))
    assert plain[:32] == list(range(32))
    for a, b in ((plain, drawn[0]), (plain, drawn[1]), drawn):
        assert sum(x != y for x, y in zip(a, b, strict=True)) > 600  # of 768: lanes
        first = [list(dict.fromkeys(t // 32 for t in order)) for order in (a, b)]
        assert first[0] != first[1]  # warps, in order of their first ticket
    assert (
        len({tuple(dict.fromkeys(t // 128 for t in tickets(kernels, emulator, seed))) for seed in range(1, 9)}) > 2
    )  # blocks
    assert tickets(kernels, emulator, 1) == drawn[0]


@pytest.mark.parametrize("seed", [0, 1])
def test_blocks_that_wait_for_one_another_need_to_be_resident_together(kernels, emulator, seed):
    for resident, kinds in ((2, set()), (1, {"deadlock"})):
        flag = torch.zeros(1, dtype=torch.int32)
        emulator.reset()
        emulator.options(seed=seed, resident=resident)
        emulator.register(flag, "flag")
        kernels("run_hand_over")(address(flag))
        found = {r.kind for r in emulator.reports()}
        assert found == kinds or (resident == 1 and seed and not found)  # by luck the second block comes first


@pytest.mark.parametrize(("stride", "passes", "sectors"), [(1, 1, 4), (2, 2, 8), (8, 8, 32), (32, 32, 32)])
def test_counters(kernels, emulator, stride, passes, sectors):
    x, y = torch.zeros(32 * 32), torch.zeros(32)
    emulator.options(counters=True)
    emulator.register(x, "x")
    emulator.register(y, "y")
    kernels("run_strides")(address(x), address(y), stride)
    assert not emulator.reports()
    (shared,) = (c for c in emulator.counters() if c.space == "shared")
    assert (shared.write, shared.bytes, shared.requests, shared.lanes) == (True, 4, 1, 32)
    assert (shared.cost, shared.minimum) == (passes, 1)
    (read,) = (c for c in emulator.counters() if c.space == "global" and not c.write)
    assert (read.cost, read.minimum, read.line) == (sectors, 4, shared.line)


def test_other_threads_may_look_while_a_kernel_runs(kernels, emulator):
    """What is observed, and the list of tensors, belong to one thread at a time."""
    x, y = torch.zeros(32 * 32), torch.zeros(32)
    others = [torch.zeros(8) for _ in range(300)]
    emulator.options(counters=True)
    emulator.register(x, "x")
    emulator.register(y, "y")

    def look():
        for i, other in enumerate(others):
            emulator.register(other, f"other {i}")
            emulator.reports()
            emulator.counters()

    thread = threading.Thread(target=look)
    thread.start()
    for _ in range(100):
        kernels("run_strides")(address(x), address(y), 1)
    thread.join(timeout=60)
    assert not thread.is_alive()
    assert not emulator.reports()
    assert {c.requests for c in emulator.counters()} == {100}


def test_without_a_compiler_the_error_says_so(monkeypatch):
    from hhattn.simt import runtime

    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match="no-such-compiler, which isn't here; install g"):
        runtime.compiler()


def test_memory_on_another_device_is_refused(emulator):
    with pytest.raises(ValueError, match="'x': the emulator reads CPU memory, this is on meta"):
        emulator.register(torch.empty(4, device="meta"), "x")
