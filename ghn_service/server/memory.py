"""Running out of memory, whichever way torch or Python says it, as one error."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ghn_service.errors import OutOfMemoryError

CPU_ALLOCATOR = "DefaultCPUAllocator"


@contextmanager
def translate_memory_errors() -> Iterator[None]:
    """Turns every kind of running out of memory into ``OutOfMemoryError``, and gives cached memory back.

    Raises:
        OutOfMemoryError: The body ran out of memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
    else:
        return
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    raise OutOfMemoryError("the device has not enough free memory for this request; try again later")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is a failed allocation; torch's CPU allocator tells it by its message only."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or CPU_ALLOCATOR in str(error)
