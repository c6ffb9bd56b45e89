"""Clocks and memory meters that the benchmarks share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

MIB = 2**20

T = TypeVar("T")


def timed(call: Callable[[], T]) -> tuple[float, T]:
    """Wall seconds of one call, and what it returned."""
    start = time.perf_counter()
    value = call()
    return time.perf_counter() - start, value


def median_seconds(call: Callable[[], object], repeats: int, *, warm_up: int = 1) -> float:
    """Median wall seconds of ``repeats`` calls, after ``warm_up`` uncounted ones."""
    for _ in range(warm_up):
        call()
    return statistics.median(timed(call)[0] for _ in range(repeats))


def median_cpu_seconds(call: Callable[[], object], repeats: int, *, warm_up: int = 1) -> float:
    """Median CPU seconds of this process in ``repeats`` calls; other processes change it little."""
    for _ in range(warm_up):
        call()
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


class PeakMemory:
    """Peak resident memory of a process of this machine between ``reset`` and ``grown_bytes`` (Linux).

    Args:
        pid: The process; None for this one.
    """

    def __init__(self, pid: int | None = None) -> None:
        self._folder = Path("/proc") / (str(pid) if pid else "self")
        self._before = 0

    def reset(self) -> None:
        """Forgets the peak and notes what is resident now."""
        (self._folder / "clear_refs").write_text("5")
        self._before = self._status("VmRSS")

    def grown_bytes(self) -> int:
        """Bytes by which the peak since ``reset`` exceeds what was resident then."""
        return self._status("VmHWM") - self._before

    def _status(self, field: str) -> int:
        for line in (self._folder / "status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
        raise OSError(f"the kernel does not tell {field}")


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Prints a Markdown table."""
    print("| " + " | ".join(header) + " |")
    print("|" + "|".join(" --- " if index == 0 else " ---: " for index in range(len(header))) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
