"""Endurance: ``make test-soak`` takes minutes; afterwards the server is as it was after its warm-up."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import Counter
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest

from ghn_client import GHNClient
from ghn_service.hypernetwork.checkpoint import save_checkpoint
from tests.end_to_end.server_process import running_server
from tests.end_to_end.soak_clients import GOOD, MODELS, Share, digest, run_probe, run_share
from tests.hypernetwork.small_graphs import small_ghn
from tests.server.small_models import LARGE
from tests.server.strangers import reading_process

NUM_REQUESTS = int(os.environ.get("SOAK_REQUESTS", "10000"))
NUM_ROUNDS = 10
WARM_UP_ROUNDS = 3
NUM_PROCESSES = 2
SPAWN = multiprocessing.get_context("spawn")


def start(stack: ExitStack, target: Any, *arguments: Any) -> Connection:
    """The pipe of a process that runs ``target(pipe, *arguments)``."""
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=target, args=(theirs, *arguments), daemon=True)
    process.start()
    stack.callback(process.kill)
    return ours


def held(process: psutil.Process) -> dict[str, int]:
    """What a process holds once it has nothing to do."""
    found: list[tuple[int, int]] = []
    while len(found) < 40 and (len(found) < 5 or len(set(found[-5:])) > 1):
        found.append((process.num_threads(), process.num_fds()))
        time.sleep(0.5)
    return {"mebibytes": process.memory_info().rss >> 20, "threads": found[-1][0], "descriptors": found[-1][1]}


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_ten_thousand_requests_leave_no_trace(tmp_path: Path) -> None:
    checkpoint = tmp_path / "small.safetensors"
    save_checkpoint(small_ghn(), checkpoint)
    with GHNClient.embedded(checkpoint) as reference:
        expected = {
            (name, seed, dtype): digest(reference.predict(MODELS[name], seed=seed, dtype=dtype).buffer)
            for name, seed, dtype in GOOD
        }
    counts: Counter[str] = Counter()
    faults: list[str] = []
    states: list[dict[str, int]] = []
    with running_server(checkpoint, "--max-queue", "64") as server, ExitStack() as stack:
        process = psutil.Process(server.process.pid)
        shares = [start(stack, run_share, Share(server.address, seed, expected)) for seed in range(NUM_PROCESSES)]
        probe = start(stack, run_probe, server.address)
        probe.send("begin")
        for _ in range(NUM_ROUNDS):
            for pipe in shares:
                pipe.send(NUM_REQUESTS // NUM_ROUNDS // NUM_PROCESSES)
            with reading_process(server.address, LARGE):
                counts["killed"] += 1
            for pipe in shares:
                made, wrong = pipe.recv()
                counts += made
                faults += wrong
            states.append(held(process))
        probe.send("end")
        seconds = sorted(probe.recv())
        codes = Counter(str(line["code"]) for line in server.log if "code" in line)
        broken = [line for line in server.log if line.get("code") in ("INTERNAL", "UNKNOWN")]
        assert server.process.poll() is None
    for state in states:
        print(state)
    print(dict(counts), dict(codes))
    print({f"health p{share}": f"{1000 * seconds[len(seconds) * share // 100]:.1f} ms" for share in (50, 95, 99)})
    warm, last = states[WARM_UP_ROUNDS:], states[-1]
    assert not faults, Counter(fault[:120] for fault in faults).most_common(10)
    assert not broken, (len(broken), broken[0])
    assert last["threads"] <= max(state["threads"] for state in warm[:2]) + 2
    assert last["descriptors"] <= max(state["descriptors"] for state in warm[:2]) + 4
    assert last["mebibytes"] <= 1.1 * max(state["mebibytes"] for state in warm[: len(warm) // 2]) + 16
    assert seconds[len(seconds) * 99 // 100] < 2.0  # 50 ms on an idle machine
