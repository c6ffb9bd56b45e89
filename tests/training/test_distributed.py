"""Two processes give what one gives with the same global meta-batch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ghn_service.training.distributed import Workers

ROOT = Path(__file__).resolve().parents[2]


def run_processes(folder: Path, count: int) -> dict:
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(count):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "-m", "tests.training.distributed_run", str(folder)]
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment))
    assert [process.wait(timeout=240) for process in processes] == [0] * count
    return torch.load(folder / "weights.pt", weights_only=True)


def test_two_processes_equal_one(tmp_path):
    one = run_processes(tmp_path / "one", 1)
    two = run_processes(tmp_path / "two", 2)
    assert one["networks"] == two["networks"] == 12
    for name, tensor in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_network_has_one_process_and_loads_are_even(world_size):
    costs = [5.0, 1.0, 1.0, 4.0, 3.0, 3.0, 1.0]
    shares = [Workers(rank, world_size, torch.device("cpu")).share(costs) for rank in range(world_size)]
    assert sorted(index for share in shares for index in share) == list(range(len(costs)))
    loads = [sum(costs[index] for index in share) for share in shares]
    assert max(loads) - min(loads) <= 2.0
