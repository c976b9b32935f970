"""GPU kernels on the CPU, thread by thread: what they compute, and what a GPU would do wrong in silence.

The emulator itself is C++ (``csrc/simt``), built at first use with g++ and kept in a cache; importing this builds
nothing. It comes with the source tree, not with the wheel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Counter", "Report", "emulate"]


@dataclass(frozen=True)
class Report:
    """Something a kernel did wrong, the first time; ``count`` says how often it did at this place.

    ``kind`` is one of: race, uninitialized, async-pending, async-source, async-not-waited, wgmma-pending,
    wgmma-no-fence, no-proxy-fence, global-oob, shared-oob, read-only, misaligned, divergence, deadlock, mask, barrier,
    mbarrier, tensor-map, launch. ``thread`` is its index in the block, -1 for what is no thread's.
    """

    kind: str
    message: str
    kernel: str
    file: str
    line: int
    block: tuple[int, int, int]
    thread: int
    count: int

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}: " if self.file else ""
        times = f" ({self.count} times)" if self.count > 1 else ""
        return f"{where}{self.kind}: {self.message} [{self.kernel}, block {self.block}, thread {self.thread}]{times}"


@dataclass(frozen=True)
class Counter:
    """What one instruction asked of memory, over all warps and launches.

    ``cost`` and ``minimum`` are passes over the banks for ``space == "shared"``, and 32-byte sectors for ``"global"``:
    what the requests took, and the fewest that could have moved the bytes. ``bytes`` is what a lane moves.
    """

    kernel: str
    file: str
    line: int
    space: str
    write: bool
    bytes: int
    requests: int
    lanes: int
    cost: int
    minimum: int


def __getattr__(name: str) -> Any:
    """``emulate``, without making every import of this one of torch's."""
    if name != "emulate":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hhattn.simt.session import emulate

    return emulate
