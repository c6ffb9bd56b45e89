"""Faults that only a GPU has; each in a process of its own, since a lost device takes its process with it."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path

import grpc
import pytest
import torch

from ghn_service.hypernetwork.checkpoint import save_checkpoint
from ghn_service.predictor import Predictor
from ghn_service.server.app import start_server
from ghn_service.server.settings import Settings
from tests.hypernetwork.small_graphs import small_ghn
from tests.server.fake_predictor import connect, predict_request
from tests.server.patience import wait_until
from tests.server.small_models import TINY, linear_model
from tests.server.test_lifecycle import NOT_SERVING, SERVICE, health

pytestmark = pytest.mark.gpu


def gpu_settings(folder: Path) -> Settings:
    checkpoint = folder / "small.safetensors"
    save_checkpoint(small_ghn(), checkpoint)
    return Settings(port=0, checkpoints=(str(checkpoint),), device=("cuda",))


def codes(stub: object, *models: bytes) -> list[str]:
    """How the predictions of these models end."""
    found = []
    for model in models:
        try:
            list(stub.PredictWeights(predict_request(model), timeout=60))  # type: ignore[attr-defined]
        except grpc.RpcError as error:
            found.append(error.code().name)
        else:
            found.append("OK")
    return found


def run_out_of_memory(pipe: Connection, folder: Path) -> None:
    with start_server(gpu_settings(folder)) as server, connect(server) as stub:
        server.wait_ready(60)
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(0.0)
        first = codes(stub, linear_model(*[8] * 800))
        torch.cuda.set_per_process_memory_fraction(1.0)
        pipe.send(first + codes(stub, TINY))


def lose_the_device(pipe: Connection, folder: Path) -> None:
    def fail(*arguments: object) -> torch.Tensor:
        return torch.zeros(1, device="cuda")[torch.tensor([5], device="cuda")].cpu()

    def load(path: Path, device: str) -> Predictor:
        predictor = Predictor.from_checkpoint(path, device=device)
        predictor.ghn.encode = fail  # type: ignore[method-assign]
        return predictor

    with start_server(gpu_settings(folder), load=load) as server, connect(server) as stub:
        server.wait_ready(60)
        found = codes(stub, TINY, TINY)
        wait_until(lambda: health(server, SERVICE) == NOT_SERVING)
        pipe.send(found)


def result_of(target: object, folder: Path) -> list[str]:
    """What ``target`` sends from a new process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, folder), daemon=True)  # type: ignore[arg-type]
    process.start()
    try:
        assert ours.poll(180)
        return ours.recv()
    finally:
        process.kill()


def test_too_little_memory_of_the_device_harms_one_request(tmp_path: Path) -> None:
    assert result_of(run_out_of_memory, tmp_path) == ["RESOURCE_EXHAUSTED", "OK"]


def test_a_lost_device_ends_readiness(tmp_path: Path) -> None:
    assert result_of(lose_the_device, tmp_path) == ["INTERNAL", "UNAVAILABLE"]
