"""The process's own memory: what is freed is kept for the next tensor."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # glibc's malloc.h


def keep_freed_memory() -> bool:
    """Let malloc keep freed memory, rather than give large tensors back to the system and have them zeroed again, page
    by page, when the next ones come: a third of the time of a convolutional decoder, and more than an element-wise op
    itself takes. The process then holds on to the most it ever used.

    It holds for the whole process, so commands do it, and the library never. Returns whether it could be done: with
    glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another libc, or Windows
        return False
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 64 << 20))  # -1: nothing is ever given back
    return all(mallopt(name, value) == 1 for name, value in settings)
