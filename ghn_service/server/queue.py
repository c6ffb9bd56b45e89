"""A bounded queue in front of the devices: work that waits, at which place, and who still wants it.

One worker thread per device takes jobs in order. Several requests may follow one job; when none is left it is given up,
in the queue or between the stages of a prediction.
"""

from __future__ import annotations

import enum
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ghn_service.errors import DeviceLostError, OverloadedError, RequestCancelledError, UnavailableError
from ghn_service.server.admission import Request

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

    WAITING = enum.auto()
    RUNNING = enum.auto()
    ENDED = enum.auto()


class Job(Generic[ResultT]):
    """Work for a device, and how many requests follow it. Made by ``WorkQueue.submit``.

    Args:
        work: What to do: called on a worker's thread with the device's index and a ``StageCallback``.
        changed: The queue's condition, which guards the attributes.

    Attributes:
        state: Where it is.
        num_followers: Requests that want it.
        stages: The stages that it has entered.
        started: ``time.monotonic()`` at which a worker took it.
        last_sign: The same of its last sign of life.
        error: What it ended with, if it failed.
    """

    def __init__(self, work: Callable[[int, StageCallback], ResultT], changed: threading.Condition) -> None:
        self.state = JobState.WAITING
        self.num_followers = 1
        self.stages: list[str] = []
        self.started = self.last_sign = 0.0
        self._work: Callable[[int, StageCallback], ResultT] | None = work
        self._changed = changed
        self._result: ResultT | None = None
        self.error: Exception | None = None

    def run(self, device_index: int) -> None:
        """Does the work on the worker's thread; keeps the result or the error."""
        work, self._work = self._work, None
        try:
            assert work is not None, "a job in the queue has work"
            self._result = work(device_index, self._enter_stage)
        except Exception as error:
            self.error = error
        except BaseException as error:  # SystemExit and the like must end neither this thread nor the caller's
            self.error = RuntimeError(f"the job was ended by {error!r}")

    def fail(self, error: Exception) -> None:
        """Ends a job that was never run; the queue's condition is held."""
        self.error, self._work, self.state = error, None, JobState.ENDED

    @property
    def has_failed(self) -> bool:
        """Whether ``result`` raises."""
        return self.error is not None

    def result(self) -> ResultT:
        """What the work returned, once the job has ended."""
        if self.error is not None:
            raise self.error
        assert self._result is not None, "a job that has ended has a result or an error"
        return self._result

    def _enter_stage(self, stage: str) -> None:
        self.last_sign = time.monotonic()
        if not self.num_followers:
            raise RequestCancelledError("nobody wants the result")
        if self.stages[-1:] != [stage]:
            with self._changed:
                self.stages.append(stage)
                self._changed.notify_all()


class WorkQueue:
    """Jobs that wait, and the threads that do them.

    Args:
        num_workers: One per device.
        max_queue: Jobs that may wait while every worker has one.

    Attributes:
        lost: What a worker ended with whose device is lost; the others go on.
    """

    def __init__(self, *, num_workers: int, max_queue: int) -> None:
        self.max_queue = max_queue
        self._waiting: deque[Job[Any]] = deque()
        self._running: dict[int, Job[Any]] = {}
        self._closed = False
        self.lost: DeviceLostError | None = None
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._run_jobs, args=(index,), name=f"ghn-worker-{index}", daemon=True)
            for index in range(num_workers)
        ]
        self._num_workers = num_workers
        for thread in self._threads:
            thread.start()

    @property
    def num_waiting(self) -> int:
        """Jobs that wait."""
        return len(self._waiting)

    def num_alive(self, silent_s: float) -> int:
        """Workers that live, and whose jobs gave a sign of life within this time."""
        oldest = time.monotonic() - silent_s
        with self._changed:
            hung = {index for index, job in self._running.items() if job.last_sign < oldest}
        return sum(thread.is_alive() and index not in hung for index, thread in enumerate(self._threads))

    def submit(self, work: Callable[[int, StageCallback], ResultT]) -> Job[ResultT]:
        """Puts work at the end of the queue; its job has one follower already.

        Raises:
            OverloadedError: Too many jobs wait.
            UnavailableError: The server is stopping.
        """
        with self._changed:
            if self._closed:
                raise UnavailableError("the server is stopping; try again")
            if len(self._waiting) + len(self._running) >= self.max_queue + len(self._threads):
                raise OverloadedError(f"{len(self._waiting)} predictions wait already; try again later")
            job = Job(work, self._changed)
            self._waiting.append(job)
            self._changed.notify_all()
        return job

    def join(self, job: Job[Any]) -> bool:
        """Lets one more request follow a job; False if it has failed or was given up."""
        with self._changed:
            can_join = not job.has_failed and (job.num_followers > 0 or job.state is JobState.ENDED)
            job.num_followers += can_join
        return can_join

    def leave(self, job: Job[Any]) -> None:
        """One request follows no longer; the last one gives up what has not ended."""
        with self._changed:
            job.num_followers -= 1
            if not job.num_followers and job.state is JobState.WAITING:
                self._waiting.remove(job)
                job.fail(RequestCancelledError("nobody wants the result"))

    def follow(self, job: Job[Any], request: Request) -> Iterator[JobProgress]:
        """Tells where a job is until it ends; ``Job.result`` has what came of it.

        Raises:
            RequestCancelledError: The request was cancelled before.
            DeadlineExceededError: The request ran out of time before.
        """
        request.on_cancel = self._wake
        last: JobProgress | None = None
        num_told = len(job.stages) if job.state is JobState.ENDED else 0
        while True:
            with self._changed:
                request.check()
                if job.state is JobState.WAITING:
                    news = [JobProgress(queue_position=self._waiting.index(job))]
                else:
                    news = [JobProgress(stage=stage) for stage in job.stages[num_told:]]
                    num_told = len(job.stages)
                if news in ([], [last]):
                    if job.state is JobState.ENDED:
                        return
                    remaining_s = request.deadline - time.monotonic()
                    self._changed.wait(max(0.001, min(remaining_s, POSITION_INTERVAL_S)))
                    continue
            yield from news
            last = news[-1]

    def close(self, timeout_s: float) -> bool:
        """Ends the workers: what waits fails, what runs is given up. Returns whether they ended in time."""
        with self._changed:
            self._refuse()
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _refuse(self) -> None:
        self._closed = True
        while self._waiting:
            self._waiting.popleft().fail(UnavailableError("the server is stopping; try again"))
        self._changed.notify_all()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _run_jobs(self, device_index: int) -> None:
        """The life of one worker."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting)
                if self._closed:
                    return
                job = self._running[device_index] = self._waiting.popleft()
                job.state = JobState.RUNNING
                job.started = job.last_sign = time.monotonic()
            job.run(device_index)
            with self._changed:
                del self._running[device_index]
                job.state = JobState.ENDED
                self._changed.notify_all()
                if isinstance(job.error, DeviceLostError):
                    self.lost = job.error
                    self._num_workers -= 1
                    if not self._num_workers:
                        self._refuse()
                    return
            del job
