"""``python -m benchmarks.path``: how many files and functions of ours one prediction enters, on all threads.

The second (warm) ``predict(module)`` and ``load_into`` of the reference network ResNet-20 on the embedded server is
traced; the network's own ``forward`` is not. A function counts once however often it is called, with its lambdas and
comprehensions beside it (those of one kind in one function count once). Then, of a new process that is not traced:
seconds from its start to loaded weights (cold), and of a further prediction (warm).
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

from ghn_architectures.registry import reference_architecture
from ghn_client import GHNClient

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = tuple(str(ROOT / name) for name in ("ghn_service", "clients/ghn_client"))


FIRST_AND_SECOND = """
import torch
from ghn_architectures.registry import build_network
from ghn_client import GHNClient
with GHNClient.embedded() as client:
    for seed in range(2):
        module = build_network("resnet20", num_classes=10)
        client.predict(module, torch.zeros(1, 3, 32, 32), seed=seed).load_into(module)
        print(seed, flush=True)
"""


class Profiler:
    """A profile function that notes which code of ours is entered while it is active."""

    def __init__(self) -> None:
        self.active = False
        self.calls: Counter[CodeType] = Counter()
        self.threads: set[str] = set()

    def __call__(self, frame: FrameType, event: str, _argument: Any) -> None:
        """Notes a call; for ``threading.setprofile``."""
        if self.active and event == "call" and frame.f_code.co_filename.startswith(PACKAGES):
            self.calls[frame.f_code] += 1
            self.threads.add(threading.current_thread().name.rstrip("0123456789_-"))

    def functions(self) -> dict[str, set[str]]:
        """Names of the functions entered, by file."""
        by_file: dict[str, set[str]] = {}
        for code in self.calls:
            file = str(Path(code.co_filename).relative_to(ROOT))
            by_file.setdefault(file, set()).add(code.co_qualname)
        return by_file


def trace_prediction() -> Profiler:
    """Predicts twice and traces the second time."""
    profiler = Profiler()
    architecture = reference_architecture("resnet20")
    module, example = architecture.build(), torch.zeros(1, *architecture.interface.input_shape)
    threading.setprofile(profiler)
    sys.setprofile(profiler)
    try:
        with GHNClient.embedded() as client:
            for profiler.active in (False, True):
                client.predict(module, example).load_into(module)
            profiler.active = False
    finally:
        threading.setprofile(None)
        sys.setprofile(None)
    return profiler


def seconds_of_predictions() -> list[float]:
    """Seconds until a new process has predicted and loaded for the first time, and for the second."""
    times = [time.perf_counter()]
    with subprocess.Popen([sys.executable, "-c", FIRST_AND_SECOND], stdout=subprocess.PIPE, text=True) as process:
        times += [time.perf_counter() for _ in process.stdout or ()]
    if process.returncode:
        raise SystemExit(process.returncode)
    return [after - before for before, after in itertools.pairwise(times)]


def main() -> None:
    """Prints the counts by folder (with ``--functions`` the names, too), and the seconds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.path", description=__doc__)
    parser.add_argument("--functions", action="store_true", help="name every function that is entered")
    options = parser.parse_args()
    profiler = trace_prediction()
    functions = profiler.functions()
    folders: dict[str, list[str]] = {}
    for file in sorted(functions):
        folders.setdefault(str(Path(file).parent), []).append(file)
    for folder, files in folders.items():
        print(f"{folder}: {len(files)} files, {sum(len(functions[file]) for file in files)} functions")
        for file in files:
            names = f": {', '.join(sorted(functions[file]))}" if options.functions else f" {len(functions[file])}"
            print(f"    {Path(file).name}{names}")
    total = sum(map(len, functions.values()))
    calls = sum(profiler.calls.values())
    print(f"{len(functions)} files, {total} functions, {calls} calls, threads: {', '.join(sorted(profiler.threads))}")
    cold, warm = seconds_of_predictions()
    print(f"seconds from a new process to loaded weights (cold) {cold:.2f}, of the next prediction (warm) {warm:.2f}")


if __name__ == "__main__":
    main()
