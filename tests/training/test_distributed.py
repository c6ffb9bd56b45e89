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
from ghn_service.training.state import load_state
from tests.training.written_images import write_image_folder

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


TINY_RUN = (
    "hypernetwork={hidden_channels=8, num_heads=2, num_layers=1, max_shape=[8,8,5,5]}",
    "data.batch_size=4",
    "sampling.meta_batch=4",
    "sampling.largest_macs=2e6",
    "sampling.start_macs=2e6",
    "optimizer.name=adamw",
    "limits.validation_networks=1",
    "limits.steps=3",
    "precision=float32",
    "threads=1",
)


def fit_with(launcher: tuple[str, ...], data: Path, out: Path) -> dict[str, torch.Tensor]:
    """The hypernetwork that ``ghn-train fit`` under this launcher saves for going on."""
    changes = [f"--set={change}" for change in TINY_RUN]
    command = [sys.executable, *launcher, "-m", "ghn_service.training", "fit", "--data", str(data), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*command, *changes], cwd=ROOT, env=environment, check=True, timeout=400)
    assert (out / "ghn.safetensors").is_file()
    return load_state(out / "state.pt").hypernetwork


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_under_torchrun_equals_one_process(tmp_path):
    write_image_folder(tmp_path / "data", classes=3)
    one = fit_with((), tmp_path / "data", tmp_path / "one")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    two = fit_with(torchrun, tmp_path / "data", tmp_path / "two")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_network_has_one_process_and_loads_are_even(world_size):
    costs = [5.0, 1.0, 1.0, 4.0, 3.0, 3.0, 1.0]
    shares = [Workers(rank, world_size, torch.device("cpu")).share(costs) for rank in range(world_size)]
    assert sorted(index for share in shares for index in share) == list(range(len(costs)))
    loads = [sum(costs[index] for index in share) for share in shares]
    assert max(loads) - min(loads) <= 2.0
