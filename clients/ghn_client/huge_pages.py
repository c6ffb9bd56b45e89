"""Memory for weights, where they are predicted and where they are received."""

from __future__ import annotations

import contextlib
import mmap

HUGE_PAGES_FROM_BYTES = 8 << 20


def allocate_buffer(num_bytes: int) -> memoryview:
    """Writable memory of this size.

    Large memory is mapped privately and in huge pages where the system has them: a bytearray is first filled with
    zeros, page by page, which costs as much as receiving the weights does.

    Raises:
        MemoryError: There is not enough.
    """
    if num_bytes < HUGE_PAGES_FROM_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return memoryview(bytearray(num_bytes))
    try:
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"cannot map {num_bytes} bytes: {error}") from error
    with contextlib.suppress(OSError):  # a kernel without huge pages is slower, and as good
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)
