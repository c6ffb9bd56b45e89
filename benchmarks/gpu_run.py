"""What a GPU that is lent for minutes is used for: ``python -m benchmarks.gpu_run --minutes 9 --data DIR --out DIR``.

Measures for a few seconds each how training runs fastest (kernels launched one by one or recorded, 1 to 8 processes on
the GPU), takes the fastest, trains until the minutes are over, validates, and writes checkpoint and ``summary.md``. The
same line goes on with the run, on another machine, too, if it finds what the last call left in ``--out``; every file
there is smaller than 16 MiB. ``--train-minutes`` is the length of the schedule over all calls.

With ``--tests`` it runs ``pytest -m gpu`` first, with ``--serving`` it measures predictions from bytes to weights for
hypernetworks of the published T and XL sizes, beside a copy of as many bytes to the host, and ``--sources NAME ...``
trains sources of weights. Without a GPU everything runs on the processor.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import timed
from benchmarks.serving import MODELS, PUBLISHED, save_untrained
from ghn_client import export_architecture
from ghn_client.atomic_file import write_file
from ghn_service.predictor import Predictor
from ghn_service.training.evaluation.report import markdown_table
from ghn_service.training.run_log import read_log
from tests.zoo_support import build_torchvision

#: Seconds kept for the last save, validation and summary.
CLOSING_SECONDS = 45.0
CHOICE = "choice.json"


@dataclass(frozen=True)
class Way:
    """How training is run: processes on the device, and whether kernels are recorded."""

    processes: int
    cuda_graphs: bool


WAYS = (Way(1, False), Way(1, True), Way(2, True), Way(4, True), Way(8, True))


def start_training(way: Way, options: argparse.Namespace, out: Path, minutes: float) -> list[subprocess.Popen[bytes]]:
    """One process per rank, with what ``torchrun`` would tell them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    changes = [*options.set, f"limits.minutes={minutes:g}", f"limits.cuda_graphs={str(way.cuda_graphs).lower()}"]
    command = [sys.executable, "-m", "ghn_service.training", "fit", "--data", str(options.data), "--out", str(out)]
    command += ["--preset", "gpu", "--cache", str(options.cache), "--state-parts"]
    command += ["--start-from", str(options.start_from)] if options.start_from else []
    command += [word for change in changes for word in ("--set", change)]
    processes = []
    for rank in range(way.processes):
        place: dict[str, Any] = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        place |= {"WORLD_SIZE": way.processes, "LOCAL_WORLD_SIZE": way.processes}
        output = (out / f"rank{rank}.txt").open("ab")
        environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
        processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
    return processes


def train(way: Way, options: argparse.Namespace, out: Path, minutes: float, deadline: float) -> bool:
    """Trains until the schedule or the time is over; whether all processes ended well."""
    out.mkdir(parents=True, exist_ok=True)
    processes = start_training(way, options, out, minutes)
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        if any(process.poll() for process in processes):  # one failed: the others would wait for it
            break
        time.sleep(0.2)
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)  # saves, validates and writes the checkpoint
    try:
        codes = [process.wait(CLOSING_SECONDS) for process in processes]
        return not any(codes)
    except subprocess.TimeoutExpired:
        for process in processes:
            process.kill()
        return False


def networks_per_second(out: Path) -> float:
    """Networks per second in the second half of the windows of a log, when the pool is warm."""
    rates = [line["networks_per_s"] for line in read_log(out) if line["kind"] == "train"]
    return statistics.median(rates[len(rates) // 2 :]) if rates else 0.0


def choose_way(options: argparse.Namespace) -> dict[str, Any]:
    """The fastest way, as it was measured by the first call."""
    path = options.out / CHOICE
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    rates = {}
    for way in WAYS[: options.ways]:
        with tempfile.TemporaryDirectory() as folder:
            out, seconds = Path(folder) / "trial", options.trial_seconds
            is_well = train(way, options, out, seconds / 60, time.monotonic() + 3 * seconds + 60)
            rates[way] = networks_per_second(out) if is_well else 0.0
            print(f"{way}: {rates[way]:.1f} networks/s", flush=True)
    best = max(rates, key=lambda way: rates[way])
    choice = {**vars(best), "rates": [[*vars(way).values(), rate] for way, rate in rates.items()]}
    write_file(path, json.dumps(choice))
    return choice


def measure_serving(device: str, models: Sequence[str], repeats: int) -> list[str]:
    """A table of milliseconds from bytes to weights, and of a copy of as many bytes to the host."""
    rows = []
    for size in ("T", "XL"):
        with tempfile.TemporaryDirectory() as folder:
            path = save_untrained(folder, PUBLISHED[size], dtype=torch.float16)
            predictor = Predictor.from_checkpoint(path, device=device)
        for model in models:
            onnx_bytes = export_architecture(*build_torchvision(model))
            runs = [timed(partial(predictor.run, onnx_bytes)) for _ in range(repeats + 1)][1:]
            num_bytes = runs[0][1].parameters.num_bytes
            there = torch.ones(num_bytes, dtype=torch.uint8, device=device)
            copies = [timed(there.clone().cpu)[0] for _ in range(repeats + 1)][1:]
            stages = [statistics.median(run[1].seconds[stage] for run in runs) for stage in runs[0][1].seconds]
            whole = statistics.median(seconds for seconds, _ in runs)
            times = [whole, *stages, statistics.median(copies)]
            rows.append([size, model, f"{num_bytes / 2**20:.0f}", *(f"{1000 * value:.1f}" for value in times)])
    header = ["size", "network", "MiB", "bytes to weights, ms", *runs[0][1].seconds, "copy to the host"]
    return markdown_table(header, rows)


def summarize(options: argparse.Namespace, choice: dict[str, Any], notes: Sequence[str]) -> None:
    """Writes ``summary.md``: ways, curve, and what else was run."""
    log = read_log(options.out) if (options.out / "log.jsonl").exists() else []
    curve = [
        [line["step"], f"{line['accuracy']:.2%}", f"{line['best']:.2%}", f"{line['worst']:.2%}"]
        for line in log
        if line["kind"] == "validation"
    ]
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "processor"
    lines = [f"# Training on {name}", "", *notes, "", "## Ways", ""]
    lines += [
        *markdown_table(["processes", "recorded", "networks/s"], choice.get("rates", [])),
        "",
        "## Validation",
        "",
    ]
    lines += markdown_table(["step", "mean", "best", "worst"], curve)
    write_file(options.out / "summary.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


def parse_options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="length of this call")
    parser.add_argument("--train-minutes", type=float, default=26.0, help="length of the schedule, over all calls")
    parser.add_argument("--data", type=Path, required=True, help="folder of images")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--cache", type=Path, help="folder for decoded images; a temporary one by default")
    parser.add_argument("--start-from", type=Path, help="checkpoint that the run begins with")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a training setting")
    parser.add_argument("--trial-seconds", type=float, default=20.0)
    parser.add_argument("--ways", type=int, default=len(WAYS), help="how many ways to try, in order")
    parser.add_argument("--tests", action="store_true", help="also run the tests that need a GPU")
    parser.add_argument("--serving", nargs="*", metavar="MODEL", help="also measure predictions")
    parser.add_argument("--sources", nargs="*", default=[], metavar="NAME", help="also train these sources")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Runs what is asked for, within the minutes."""
    begin = time.monotonic()
    options = parse_options(words)
    options.out.mkdir(parents=True, exist_ok=True)
    notes = []
    with tempfile.TemporaryDirectory() as folder:
        options.cache = options.cache or Path(folder)
        for pool in options.out.glob("pool-*.json.gz"):
            shutil.copy(pool, options.cache)
        if options.tests:
            command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
            notes.append(f"Tests: {subprocess.run(command, capture_output=True, text=True).stdout.splitlines()[-1]}")
        if options.serving is not None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            notes += ["", *measure_serving(device, options.serving or MODELS, repeats=5)]
        for name in options.sources:
            command = [sys.executable, "-m", "ghn_service.training", "source", name, "--data", str(options.data)]
            ended = subprocess.run([*command, "--out", str(options.out / name)], capture_output=True, text=True)
            notes.append((ended.stdout or ended.stderr).splitlines()[-1])
        choice = choose_way(options)
        for pool in options.cache.glob("pool-*.json.gz"):
            shutil.copy(pool, options.out)
        deadline = begin + 60 * options.minutes - CLOSING_SECONDS
        way = Way(choice["processes"], choice["cuda_graphs"])
        is_well = train(way, options, options.out, options.train_minutes, deadline)
        notes.append("" if is_well else "The training did not end well; see rank0.txt.")
    summarize(options, choice, notes)


if __name__ == "__main__":
    main()
