"""One setting of the C library: keep freed buffers for the next batch instead of returning them at once."""

from __future__ import annotations

import ctypes
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # <malloc.h>
_LARGEST_BLOCK = 32 << 20  # the most that glibc accepts
_KEPT = 512 << 20


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
