"""One setting of the C library that a step on a CPU is a tenth or more faster with."""

from __future__ import annotations

import ctypes
import sys

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let this process keep freed memory for its next allocation instead of giving it back.

    Every step allocates and frees the same activations. By default glibc returns each large one
    to the system, and getting it again costs the clearing of all its pages; kept, a step of
    ViT-B/16 has no page faults at all, and peak memory is the same.

    Returns:
        Whether it took effect: under glibc it does, elsewhere nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
