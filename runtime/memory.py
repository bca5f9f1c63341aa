"""This process's memory: freed buffers are kept for the next batch or given back, and nobody is shown what it holds."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # <malloc.h>
_LARGEST_BLOCK = 32 << 20  # the most that glibc accepts
_KEPT = 512 << 20
_LARGE_BLOCK = 1 << 20  # of which a large model has many
_SET_DUMPABLE = 4  # <linux/prctl.h>


@cache
def keep_freed_buffers() -> bool:
    """Let glibc reuse blocks up to 32 MiB; returns whether it took the setting.

    By default every tensor above 128 KiB is mapped and unmapped anew, and the kernel clears its pages each
    time: about a sixth of a batch's time. Elsewhere than on glibc nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_BLOCK)) and bool(mallopt(_TRIM_THRESHOLD, _KEPT))


def release_freed_buffers() -> None:
    """Give back what was kept."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_little() -> None:
    """Keep less from now on, and give back what was kept: beside a large model, memory is dearer than time."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGE_BLOCK)
    release_freed_buffers()


def keep_memory_private() -> None:
    """No core dump of this process, and no debugger of the same user attaches to it: it holds keys, masks and shares.

    Elsewhere than on Linux there is no core dump, and that is all.
    """
    import resource  # where there is none, no party runs

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_SET_DUMPABLE, 0, 0, 0, 0)
