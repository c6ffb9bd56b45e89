"""``WorkerPool``: independent jobs in one process or several, which can be interrupted and stop at a deadline."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, TypeVar

Task = TypeVar("Task")
Outcome = TypeVar("Outcome")

_context: Any = None


class WorkerPool:
    """Processes that prepare themselves once and then do jobs.

    Args:
        workers: Number of processes; with 1 the calling process does the work itself.
        start: Prepares a process: called with ``setup``, returns what jobs need.
        setup: What ``start`` needs; it is pickled.
        deadline: Value of ``time.monotonic()`` after which no job begins; None for none.
    """

    def __init__(self, workers: int, start: Callable[[Any], Any], setup: Any, *, deadline: float | None = None) -> None:
        self.workers, self.start, self.setup, self.deadline = workers, start, setup, deadline
        self._executor: ProcessPoolExecutor | None = None
        self._own_context: Any = None

    def __enter__(self) -> WorkerPool:
        if self.workers > 1:
            self._executor = ProcessPoolExecutor(
                self.workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_begin,
                initargs=(self.start, self.setup),
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._executor is None:
            return
        if kind is not None:  # nobody waits for what is running
            self._executor.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
        self._executor.shutdown()

    def run(self, work: Callable[[Any, Task], Outcome], tasks: Sequence[Task]) -> Iterator[tuple[Task, Outcome]]:
        """Does ``work(context, task)`` for every task that can begin before the deadline.

        Args:
            work: A function of a module; it is pickled.
            tasks: What to do, in this order.

        Yields:
            Tasks and outcomes as they are finished.
        """
        if not tasks:
            return
        if self._executor is None:
            yield from self._run_here(work, tasks)
            return
        waiting = iter(tasks)
        running: dict[Future[Outcome], Task] = {}
        while True:
            while len(running) < self.workers and not self._is_late():
                task = next(waiting, None)
                if task is None:
                    break
                running[self._executor.submit(_work, work, task)] = task
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()

    def _run_here(self, work: Callable[[Any, Task], Outcome], tasks: Sequence[Task]) -> Iterator[tuple[Task, Outcome]]:
        if self._own_context is None:
            self._own_context = self.start(self.setup)
        for task in tasks:
            if self._is_late():
                return
            yield task, work(self._own_context, task)

    def _is_late(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline


def _begin(start: Callable[[Any], Any], setup: Any) -> None:
    global _context
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to every process; the calling one decides
    _context = start(setup)


def _work(work: Callable[[Any, Task], Outcome], task: Task) -> Outcome:
    return work(_context, task)


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Within this context SIGTERM raises ``KeyboardInterrupt``, as SIGINT does; only in the main thread."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not in the main thread: whoever runs us handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
