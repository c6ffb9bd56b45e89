"""Ends calls that stand still or crawl: gRPC itself would hold their thread and memory for ever."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

CHECKS_PER_LIMIT = 8


class CallWatch:
    """One call under watch.

    Args:
        cancel: Ends the call, from any thread.
        deadline: ``time.monotonic()`` at which it ends in any case.
        idle_s: Seconds that it may stand still, and be behind the least rate.
        min_rate: Least bytes per second that the client has to take; 0 for any.

    Attributes:
        ends: ``time.monotonic()`` at which the call is cancelled, as things stand.
    """

    def __init__(self, cancel: Callable[[], object], deadline: float, idle_s: float, min_rate: float) -> None:
        self.cancel = cancel
        self._deadline = deadline
        self._idle_s = idle_s
        self._min_rate = min_rate
        self._start = time.monotonic()
        self._num_bytes = 0
        self.touch(0)

    def touch(self, num_bytes: int) -> None:
        """The client took this much more, and everything before."""
        self._num_bytes += num_bytes
        behind = self._start + self._num_bytes / self._min_rate if self._min_rate else math.inf
        self.ends = min(self._deadline, min(time.monotonic(), behind) + self._idle_s)


class Watchdog:
    """Cancels calls that are watched and have come to their end.

    Args:
        idle_s: Seconds that a stream may stand still.
        min_rate: Least bytes per second of a stream; 0 for any.
        on_check: Called every second or more often.
    """

    def __init__(self, idle_s: float, min_rate: float = 0.0, on_check: Callable[[], None] = lambda: None) -> None:
        self._idle_s = idle_s
        self._min_rate = min_rate
        self._on_check = on_check
        self._watches: set[CallWatch] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ghn-watchdog", daemon=True)

    def start(self) -> None:
        """Begins to look."""
        self._thread.start()

    @contextmanager
    def watch_stream(self, cancel: Callable[[], object], *, deadline: float) -> Iterator[CallWatch]:
        """Watches a stream while the body sends it, and says with ``touch`` what was taken."""
        with self._watched(CallWatch(cancel, deadline, self._idle_s, self._min_rate)) as watch:
            yield watch

    @contextmanager
    def limit(self, cancel: Callable[[], object], seconds: float) -> Iterator[None]:
        """Cancels a call whose body takes longer than this."""
        with self._watched(CallWatch(cancel, time.monotonic() + seconds, math.inf, 0.0)):
            yield

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()
        self._thread.join()

    @contextmanager
    def _watched(self, watch: CallWatch) -> Iterator[CallWatch]:
        with self._lock:
            self._watches.add(watch)
        try:
            yield watch
        finally:
            with self._lock:
                self._watches.discard(watch)

    def _run(self) -> None:
        while not self._closed.wait(min(1.0, self._idle_s / CHECKS_PER_LIMIT)):
            now = time.monotonic()
            with self._lock:
                stuck = [watch for watch in self._watches if now > watch.ends]
                self._watches.difference_update(stuck)
            for watch in stuck:
                watch.cancel()
            try:
                self._on_check()
            except Exception:  # whatever is wrong there, streams are still to be watched
                logger.exception("a check failed")
