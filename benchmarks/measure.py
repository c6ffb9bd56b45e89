"""Clocks and memory meters that the benchmarks share."""

from __future__ import annotations

import gc
import mmap
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ghn_client.huge_pages import allocate_buffer

MIB = 2**20

T = TypeVar("T")


def timed(call: Callable[[], T]) -> tuple[float, T]:
    """Wall seconds of one call, and what it returned."""
    start = time.perf_counter()
    value = call()
    return time.perf_counter() - start, value


def median_seconds(call: Callable[[], object], repeats: int, *, prepare: Callable[[], object]) -> float:
    """Median wall seconds of ``repeats`` calls, after an uncounted one; ``prepare`` comes before each."""
    seconds = []
    for _ in range(1 + repeats):
        prepare()
        seconds.append(timed(call)[0])
    return statistics.median(seconds[1:])


def paired_cpu_seconds(one: Callable[[], object], other: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median CPU seconds of this process in ``repeats`` calls of each, in turns, after an uncounted one.

    Garbage is collected before each call: one collection of a large heap takes about as long as what is measured.
    """
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(1 + repeats):
        for call, measured in zip((one, other), seconds, strict=True):
            gc.collect()
            start = time.process_time()
            call()
            measured.append(time.process_time() - start)
    return statistics.median(seconds[0][1:]), statistics.median(seconds[1][1:])


def warm_memory(num_bytes: int) -> None:
    """Uses that much memory and frees it, so that what comes next finds pages that the machine has at hand."""
    if num_bytes:
        memory = allocate_buffer(num_bytes)
        memory[:: mmap.PAGESIZE] = bytes(len(range(0, num_bytes, mmap.PAGESIZE)))


class PeakMemory:
    """Peak resident memory of a process of this machine between ``reset`` and ``grown_bytes`` (Linux).

    Args:
        pid: The process; None for this one.
    """

    def __init__(self, pid: int | None = None) -> None:
        self._pid = pid
        self._before = 0

    def reset(self) -> None:
        """Forgets the peak and notes what is resident now."""
        _process_file("clear_refs", self._pid).write_text("5")
        self._before = status_bytes("VmRSS", self._pid)

    def grown_bytes(self) -> int:
        """Bytes by which the peak since ``reset`` exceeds what was resident then."""
        return status_bytes("VmHWM", self._pid) - self._before


def status_bytes(field: str, pid: int | None = None) -> int:
    """A size in the kernel's status of a process, such as ``VmRSS``; None for this process (Linux)."""
    for line in _process_file("status", pid).read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"the kernel does not tell {field}")


def _process_file(name: str, pid: int | None) -> Path:
    return Path("/proc") / (str(pid) if pid else "self") / name
