"""Keeps freed memory in the process on Linux: training steps allocate and free the same large arrays all the time.

By default the C library returns arrays of more than 128 KiB to the system at once and gets them back as fresh pages,
which the kernel must clear first; a training step spends a third of its time on that.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # names of parameters in malloc.h


def keep_freed_memory() -> bool:
    """Tells the C library to keep freed memory for reuse.

    Returns:
        Whether it understood; elsewhere than with glibc nothing changes.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = ((_MMAP_THRESHOLD, 32 << 20), (_TRIM_THRESHOLD, (1 << 31) - 1), (_TOP_PAD, 64 << 20))
    return all(mallopt(name, value) == 1 for name, value in settings)
