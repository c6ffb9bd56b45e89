"""Memory and checksum of a large stream, at the least cost that Python allows."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import queue
import threading

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


class BackgroundSha256:
    """sha256 of pieces, computed beside the thread that sends or receives them; hashlib releases the interpreter.

    A context manager: leaving it early drops what is not hashed yet.
    """

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._pieces: queue.SimpleQueue[bytes | memoryview | None] = queue.SimpleQueue()
        self._dropped = False
        self._thread = threading.Thread(target=self._run, name="ghn-sha256", daemon=True)
        self._thread.start()

    def __enter__(self) -> BackgroundSha256:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._dropped = True
        self._pieces.put(None)
        self._thread.join()

    def update(self, piece: bytes | memoryview) -> None:
        """Appends a piece, which must not change until ``hexdigest`` has returned."""
        self._pieces.put(piece)

    def hexdigest(self) -> str:
        """The digest of all pieces; to be called once, last."""
        self._pieces.put(None)
        self._thread.join()
        return self._sha256.hexdigest()

    def _run(self) -> None:
        while (piece := self._pieces.get()) is not None:
            if not self._dropped:
                self._sha256.update(piece)
