"""Jobs in one process and in several."""

from __future__ import annotations

import os
import signal
import time

import pytest

from ghn_service.training.worker_pool import WorkerPool, interrupted_by_sigterm


def prepare(setup):
    return setup * 10


def add(context, task):
    return context + task


def fail(context, task):
    if task == 2:
        raise ValueError(task)
    time.sleep(60)


def terminate_this_process():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)


@pytest.mark.parametrize("workers", [1, 2])
def test_every_task_is_done_with_what_was_prepared(workers):
    with WorkerPool(workers, prepare, 3) as pool:
        assert sorted(pool.run(add, [1, 2, 3])) == [(1, 31), (2, 32), (3, 33)]
        assert list(pool.run(add, [4])) == [(4, 34)]


def test_tasks_begin_in_order_in_one_process():
    with WorkerPool(1, prepare, 0) as pool:
        assert [task for task, _ in pool.run(add, [3, 1, 2])] == [3, 1, 2]


@pytest.mark.parametrize("workers", [1, 2])
def test_nothing_begins_after_the_deadline(workers):
    with WorkerPool(workers, prepare, 3, deadline=time.monotonic()) as pool:
        assert list(pool.run(add, [1, 2])) == []


def test_an_error_ends_the_other_processes():
    with pytest.raises(ValueError), WorkerPool(2, prepare, 3) as pool:
        list(pool.run(fail, [1, 2]))


def test_sigterm_interrupts():
    with pytest.raises(KeyboardInterrupt), interrupted_by_sigterm():
        terminate_this_process()
