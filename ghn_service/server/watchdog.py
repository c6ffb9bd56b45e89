"""Ends streams whose client stopped reading: gRPC itself would hold their thread and weights for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

CHECKS_PER_LIMIT = 8


class StreamWatch:
    """One stream under watch.

    Args:
        cancel: Ends the call, from any thread.
        deadline: ``time.monotonic()`` at which the stream ends in any case.
    """

    def __init__(self, cancel: Callable[[], object], deadline: float) -> None:
        self.cancel = cancel
        self.deadline = deadline
        self.last_sent = time.monotonic()

    def touch(self) -> None:
        """The client took everything so far."""
        self.last_sent = time.monotonic()


class Watchdog:
    """Cancels streams that stand still.

    Args:
        idle_s: Seconds without progress after which a stream is cancelled.
    """

    def __init__(self, idle_s: float) -> None:
        self.idle_s = idle_s
        self._watches: set[StreamWatch] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ghn-watchdog", daemon=True)
        self._thread.start()

    @contextmanager
    def watch(self, cancel: Callable[[], object], *, deadline: float) -> Iterator[StreamWatch]:
        """Watches a stream while the body sends it."""
        watch = StreamWatch(cancel, deadline)
        with self._lock:
            self._watches.add(watch)
        try:
            yield watch
        finally:
            with self._lock:
                self._watches.discard(watch)

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed.wait(min(1.0, self.idle_s / CHECKS_PER_LIMIT)):
            now = time.monotonic()
            with self._lock:
                stuck = [item for item in self._watches if now > min(item.deadline, item.last_sent + self.idle_s)]
                self._watches.difference_update(stuck)
            for watch in stuck:
                watch.cancel()
