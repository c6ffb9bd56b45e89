"""What a plan may cost: structures are of strangers, and a small one can say that axes have endlessly many parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from ghn_service.errors import LimitExceededError
from ghn_service.graph.raw_graph import CHECK_EVERY, never_ends

MAX_NESTING = 64
"""How deep parts of axes lie in each other; whoever walks through them recursively counts on it."""
MAX_WORK = 20_000_000
"""Units of work of one plan: parts of axes looked at, pairs compared, numbers kept; seconds in all.

A DenseNet of 100 layers takes 170,000 for its own weights, most networks less than 60,000.
"""


class _Work:
    def __init__(self, check: Callable[[], None]) -> None:
        self.check, self.spent, self.next_check, self.nesting = check, 0, 0, 0


_WORK: ContextVar[_Work | None] = ContextVar("work of the plan that is being made", default=None)


@contextmanager
def counted_work(check: Callable[[], None] = never_ends) -> Iterator[None]:
    """Counts what the body spends on this thread; ``check`` is called every few milliseconds and may raise."""
    token = _WORK.set(_Work(check))
    try:
        yield
    finally:
        _WORK.reset(token)


def spend(amount: int = 1) -> None:
    """Counts units of work, and looks now and then whether the plan is still wanted.

    Raises:
        LimitExceededError: There were more than ``MAX_WORK``.
    """
    work = _WORK.get()
    if work is None:
        return
    work.spent += amount
    if work.spent >= work.next_check:
        work.next_check = work.spent + CHECK_EVERY
        work.check()
        if work.spent > MAX_WORK:
            raise LimitExceededError(
                f"to tell which channels of the source fit takes over {MAX_WORK} steps, as axes have too many parts or"
                " operators follow on each other without end; ask without a source"
            )


@contextmanager
def nested() -> Iterator[None]:
    """Counts how deep the body is in itself.

    Raises:
        RecursionError: It is deeper than ``MAX_NESTING``, wherever in the stack it began.
    """
    work = _WORK.get()
    if work is None:
        yield
        return
    if work.nesting >= MAX_NESTING:
        raise RecursionError(f"axes nest deeper than {MAX_NESTING}")
    work.nesting += 1
    try:
        yield
    finally:
        work.nesting -= 1
