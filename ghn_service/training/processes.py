"""Signals, and independent tasks in one process or several, which can be interrupted and stop at a deadline."""

from __future__ import annotations

import itertools
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

Task = TypeVar("Task")
Outcome = TypeVar("Outcome")

_context: Any = None


def work_through(
    work: Callable[[Any, Task], Outcome],
    tasks: Sequence[Task],
    *,
    start: Callable[[], Any],
    workers: int = 1,
    deadline: float | None = None,
) -> Generator[tuple[Task, Outcome]]:
    """Does ``work(context, task)`` for every task, in order, that can begin before the deadline (``time.monotonic()``).

    In each process ``start`` gives the context once; both functions are pickled. With one worker the calling process
    does the work itself.

    Yields:
        Tasks and outcomes as they are finished; where the caller stops asking, running tasks are ended.
    """

    def is_late() -> bool:
        return deadline is not None and time.monotonic() >= deadline

    if not tasks or is_late():
        return
    if workers == 1:
        context = start()
        for task in itertools.takewhile(lambda _: not is_late(), tasks):
            yield task, work(context, task)
        return
    waiting = list(reversed(tasks))
    spawn = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_begin, initargs=(start,))
    running: dict[Future[Outcome], Task] = {}
    try:
        while True:
            while waiting and len(running) < workers and not is_late():
                task = waiting.pop()
                running[executor.submit(_work, work, task)] = task
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
    except BaseException:  # nobody waits for what is running
        executor.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        executor.shutdown()


def _begin(start: Callable[[], Any]) -> None:
    global _context
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to every process; the calling one decides
    _context = start()


def _work(work: Callable[[Any, Task], Outcome], task: Task) -> Outcome:
    return work(_context, task)


@contextmanager
def on_stop_signals(handle: Callable[[int, FrameType | None], None], *, after_s: float | None = None) -> Iterator[None]:
    """Within this context SIGTERM, SIGINT and the end of ``after_s`` seconds call ``handle``.

    ``signal.default_int_handler`` makes them raise ``KeyboardInterrupt``. Nothing happens outside the main thread.
    """
    watched = (signal.SIGTERM, signal.SIGINT, *(() if after_s is None else (signal.SIGALRM,)))
    if threading.current_thread() is not threading.main_thread():  # whoever runs us handles signals
        yield
        return
    before = [signal.signal(number, handle) for number in watched]
    try:
        if after_s is not None:
            signal.setitimer(signal.ITIMER_REAL, max(after_s, 1e-6))
        yield
    finally:
        if after_s is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in zip(watched, before, strict=True):
            signal.signal(number, handler)
