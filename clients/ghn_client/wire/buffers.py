"""Memory and checksum of a large stream, at the least cost that Python allows."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import queue
import threading
import weakref

HUGE_PAGES_FROM_BYTES = 8 << 20
HASHED_AT_ONCE_BYTES = 16 << 20
"""Bytes that are hashed before anybody asks whether the rest is still wanted; some milliseconds."""


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
    """sha256 of pieces, computed beside the thread that makes or receives them: hashlib releases the interpreter.

    A context manager: leaving it early drops what is not hashed yet. One that is forgotten ends its thread as well.
    """

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._pieces: queue.SimpleQueue[bytes | memoryview | None] = queue.SimpleQueue()
        self._dropped = threading.Event()
        work = (self._sha256, self._pieces, self._dropped)  # not self, which could not be forgotten otherwise
        self._thread = threading.Thread(target=_hash_pieces, args=work, name="ghn-sha256", daemon=True)
        self._thread.start()
        self._drop = weakref.finalize(self, _drop_pieces, self._pieces, self._dropped)

    def __enter__(self) -> BackgroundSha256:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the thread; what is not hashed yet is dropped."""
        self._drop()
        self._thread.join()

    def update(self, piece: bytes | memoryview) -> None:
        """Appends a piece, which must not change until ``hexdigest`` has returned."""
        for start in range(0, len(piece), HASHED_AT_ONCE_BYTES):
            self._pieces.put(memoryview(piece)[start : start + HASHED_AT_ONCE_BYTES])

    def hexdigest(self) -> str:
        """The digest of all pieces; to be called once, last."""
        self._pieces.put(None)
        self._thread.join()
        return self._sha256.hexdigest()


def _hash_pieces(
    sha256: hashlib._Hash, pieces: queue.SimpleQueue[bytes | memoryview | None], dropped: threading.Event
) -> None:
    while (piece := pieces.get()) is not None:
        if not dropped.is_set():
            sha256.update(piece)


def _drop_pieces(pieces: queue.SimpleQueue[bytes | memoryview | None], dropped: threading.Event) -> None:
    dropped.set()
    pieces.put(None)
