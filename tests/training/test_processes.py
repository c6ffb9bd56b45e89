"""Jobs in one process and in several."""

from __future__ import annotations

import os
import signal
import time

import pytest

from ghn_service.training.processes import on_stop_signals, work_through


def prepare():
    return 30


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
    finished = work_through(add, [1, 2, 3], start=prepare, workers=workers)
    assert sorted(finished) == [(1, 31), (2, 32), (3, 33)]


def test_tasks_begin_in_order_in_one_process():
    assert [task for task, _ in work_through(add, [3, 1, 2], start=prepare)] == [3, 1, 2]


@pytest.mark.parametrize("workers", [1, 2])
def test_nothing_begins_after_the_deadline(workers):
    now = time.monotonic()
    assert list(work_through(add, [1, 2], start=prepare, workers=workers, deadline=now)) == []


def test_an_error_ends_the_other_processes():
    with pytest.raises(ValueError):
        list(work_through(fail, [1, 2], start=prepare, workers=2))


@pytest.mark.parametrize("workers", [1, 2])
def test_the_end_of_the_time_interrupts_what_runs(workers):
    with pytest.raises(KeyboardInterrupt), on_stop_signals(signal.default_int_handler, after_s=1.0):
        list(work_through(fail, [1, 1], start=prepare, workers=workers))


def test_sigterm_interrupts():
    with pytest.raises(KeyboardInterrupt), on_stop_signals(signal.default_int_handler):
        terminate_this_process()
