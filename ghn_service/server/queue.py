"""A bounded queue in front of the devices: who waits, at which place, and who has been given up.

One worker thread per device takes jobs in order. A job is cancelled or runs out of time without anybody's help: it is
checked when it is taken, and between the stages of a prediction.
"""

from __future__ import annotations

import enum
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from ghn_service.errors import DeadlineExceededError, OverloadedError, RequestCancelledError, UnavailableError

ResultT = TypeVar("ResultT")
POSITION_INTERVAL_S = 1.0

StageCallback = Callable[[str], None]
"""Called by the work of a job with the name of its stage; raises if the job is to end."""


@dataclass(frozen=True, slots=True)
class JobProgress:
    """Where a job is: waiting at a place of the queue (0 is next), or in a stage."""

    stage: str = ""
    queue_position: int = 0


class JobState(enum.Enum):
    """Where a job is, from the queue's point of view."""

    ADMITTED = enum.auto()
    WAITING = enum.auto()
    RUNNING = enum.auto()
    ABANDONED = enum.auto()
    ENDED = enum.auto()


class Job(Generic[ResultT]):
    """A place for one request, from before its architecture is read until its reply is sent.

    A context manager: leaving it frees the place and gives up the work. Made by ``WorkQueue.admit``.

    Args:
        work_queue: The queue.
        deadline: ``time.monotonic()`` at which the answer is worthless.

    Attributes:
        state: Written by the queue, under its lock.
        wait_s: Seconds that it waited for a device.
    """

    def __init__(self, work_queue: WorkQueue, deadline: float) -> None:
        self.deadline = deadline
        self.state = JobState.ADMITTED
        self.wait_s = 0.0
        self._queue = work_queue
        self._work: Callable[[int, StageCallback], ResultT] | None = None
        self._submitted = 0.0
        self._result: ResultT | None = None
        self._error: Exception | None = None
        self._cancelled = threading.Event()
        self._updates: queue.SimpleQueue[JobProgress | None] = queue.SimpleQueue()

    def __enter__(self) -> Job[ResultT]:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.cancel()
        self._queue.release(self)

    def cancel(self) -> None:
        """Gives the job up; it ends at its next stage, or within one."""
        self._cancelled.set()
        self._updates.put(None)

    def check(self) -> None:
        """Raises if the job has been given up or is out of time."""
        if self._cancelled.is_set():
            raise RequestCancelledError("the request was cancelled")
        if time.monotonic() > self.deadline:
            raise DeadlineExceededError("the request ran out of time before its weights were predicted")

    def follow(self, work: Callable[[int, StageCallback], ResultT]) -> Iterator[JobProgress]:
        """Puts the work at the end of the queue and tells where it is until it ends; ``result`` has what it returns.

        Args:
            work: What to do on a device: called on the worker's thread with the device's index and a ``StageCallback``.
        """
        self._work, self._submitted = work, time.monotonic()
        self._queue.submit(self)
        last: JobProgress | None = None
        while True:
            place = self._queue.position(self)
            if place >= 0 and (update := JobProgress(queue_position=place)) != last:
                last = update
                yield update
            timeout = max(0.0, min(self.deadline - time.monotonic(), POSITION_INTERVAL_S))
            try:
                stage = self._updates.get(timeout=timeout or 0.001)
            except queue.Empty:
                if place >= 0:
                    self.check()
                elif time.monotonic() > self.deadline:
                    self.cancel()
                    raise DeadlineExceededError("the request ran out of time while it was computed") from None
                continue
            if stage is None:
                return
            if stage != last:
                last = stage
                yield stage

    def result(self) -> ResultT:
        """What the work returned, once ``follow`` has ended; handed out once, so that nothing keeps it alive."""
        if self._error is not None:
            raise self._error
        self.check()
        result, self._result = self._result, None
        assert result is not None, "a job that has ended has a result or an error"
        return result

    def run(self, device_index: int) -> None:
        """Does the work on the worker's thread; keeps the result or the error."""
        self.wait_s = time.monotonic() - self._submitted
        work, self._work = self._work, None
        try:
            assert work is not None, "a job in the queue has work"
            self.check()
            self._result = work(device_index, self._enter_stage)
        except Exception as error:
            self._error = error
        except BaseException as error:  # SystemExit and the like must end neither this thread nor the caller's
            self._error = RuntimeError(f"the job was ended by {error!r}")
        finally:
            self._updates.put(None)

    def fail(self, error: Exception) -> None:
        """Ends a job that was never run."""
        self._error, self._work = error, None
        self._updates.put(None)

    def _enter_stage(self, stage: str) -> None:
        self.check()
        self._updates.put(JobProgress(stage=stage))


class WorkQueue:
    """Jobs that wait, and the threads that do them.

    Args:
        num_workers: One per device.
        max_queue: Jobs that may wait.
        max_active: Jobs that may be done and not yet released: their results are in memory.
    """

    def __init__(self, *, num_workers: int, max_queue: int, max_active: int) -> None:
        self.max_queue = max_queue
        self.max_active = max_active
        self._waiting: deque[Job[object]] = deque()
        self._num_admitted = 0
        self._num_active = 0
        self._closed = False
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._run_jobs, args=(index,), name=f"ghn-worker-{index}", daemon=True)
            for index in range(num_workers)
        ]
        for thread in self._threads:
            thread.start()

    def admit(self, *, deadline: float) -> Job[ResultT]:
        """A place for one request.

        Raises:
            OverloadedError: Every place is taken.
            UnavailableError: The server is stopping.
        """
        with self._changed:
            if self._closed:
                raise UnavailableError("the server is stopping; try again")
            if self._num_admitted >= self.max_queue + self.max_active:
                raise OverloadedError(
                    f"{self._num_admitted} requests are being served or waiting, which is all that this server takes; "
                    "try again later"
                )
            self._num_admitted += 1
        return Job(self, deadline)

    def submit(self, job: Job[ResultT]) -> None:
        """Puts a job at the end of the queue.

        Raises:
            UnavailableError: The server is stopping.
        """
        with self._changed:
            if self._closed:
                raise UnavailableError("the server is stopping; try again")
            self._waiting.append(job)  # type: ignore[arg-type]
            job.state = JobState.WAITING
            self._changed.notify_all()

    def position(self, job: Job[ResultT]) -> int:
        """Jobs ahead of this one; -1 if it does not wait."""
        with self._changed:
            return self._waiting.index(job) if job.state is JobState.WAITING else -1  # type: ignore[arg-type]

    def release(self, job: Job[ResultT]) -> None:
        """Frees the place of a request, and of its job; one that still runs keeps its own until it ends."""
        with self._changed:
            self._num_admitted -= 1
            if job.state is JobState.WAITING:
                self._waiting.remove(job)  # type: ignore[arg-type]
            elif job.state is JobState.ENDED:
                self._num_active -= 1
            elif job.state is JobState.RUNNING:
                job.state = JobState.ABANDONED
            self._changed.notify_all()

    def close(self, timeout_s: float) -> bool:
        """Ends the workers: what waits fails, what runs is given up. Returns whether they ended in time."""
        with self._changed:
            self._closed = True
            waiting, self._waiting = list(self._waiting), deque()
            for job in waiting:
                job.state = JobState.ADMITTED
            self._changed.notify_all()
        for job in waiting:
            job.fail(UnavailableError("the server is stopping; try again"))
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run_jobs(self, device_index: int) -> None:
        """The life of one worker."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or (self._waiting and self._num_active < self.max_active))
                if self._closed:
                    return
                self._num_active += 1
                job = self._waiting.popleft()
                job.state = JobState.RUNNING
            job.run(device_index)
            with self._changed:
                if job.state is JobState.ABANDONED:
                    self._num_active -= 1
                    self._changed.notify_all()
                job.state = JobState.ENDED
            del job
