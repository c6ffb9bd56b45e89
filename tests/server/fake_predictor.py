"""A predictor that is fast and does what a test wants: wait, fail, run out of memory."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import torch

from ghn_client.wire import ghn_pb2, ghn_pb2_grpc
from ghn_service.graph.architecture import ArchitectureGraph
from ghn_service.hypernetwork.checkpoint import CheckpointSummary, ModelCard
from ghn_service.hypernetwork.config import GHNConfig
from ghn_service.parameters import PREDICTED, ParameterSet
from ghn_service.predictor import (
    DECODING,
    DTYPES,
    ENCODING,
    ArchitectureAnalysis,
    OnStage,
    PredictionOptions,
    PredictionResult,
)
from ghn_service.server.app import RunningServer, start_server
from ghn_service.server.settings import Settings

SUMMARY = CheckpointSummary(GHNConfig(), ModelCard(dataset="none"), "ab" * 32, 12_345, 67_890)


@dataclass
class FakePredictor:
    """Draws every tensor, by default normally; ``before_decoding`` is called on the worker's thread."""

    before_decoding: Callable[[OnStage], None] = lambda on_stage: None
    summary: CheckpointSummary | None = SUMMARY
    num_runs: int = 0
    threads: list[str] = field(default_factory=list)
    draw: Callable[[tuple[int, ...], torch.Generator], torch.Tensor] = lambda shape, generator: torch.randn(
        shape, generator=generator
    )

    def run(
        self, architecture: ArchitectureGraph, *, options: PredictionOptions, on_stage: OnStage, transfer: Any = None
    ) -> PredictionResult:
        self.num_runs += 1
        self.threads.append(threading.current_thread().name)
        on_stage(ENCODING)
        on_stage(DECODING)
        self.before_decoding(on_stage)
        generator = torch.Generator().manual_seed(options.seed)
        specs = {spec.name: spec for spec in architecture.parameters() if options.includes(spec.name)}
        dtype = DTYPES[options.dtype]
        tensors = {name: self.draw(spec.shape, generator).to(dtype) for name, spec in specs.items()}
        origins = dict.fromkeys(specs, PREDICTED)
        parameters = ParameterSet(specs, tensors, origins, architecture.warnings)
        return PredictionResult(parameters, architecture, {ENCODING: 0.0, DECODING: 0.0})

    def analyze(
        self, architecture: ArchitectureGraph, *, transfer: Any = None, head: str = "auto"
    ) -> ArchitectureAnalysis:
        specs = {spec.name: spec for spec in architecture.parameters()}
        op_types = {spec.name: node.op_type for node in architecture.nodes for spec in node.parameters}
        return ArchitectureAnalysis(
            architecture, specs, dict.fromkeys(specs, PREDICTED), op_types, architecture.warnings
        )


def raises(error: BaseException) -> Callable[[OnStage], None]:
    """A ``before_decoding`` that fails."""

    def fail(on_stage: OnStage) -> None:
        raise error

    return fail


class Gate:
    """A ``before_decoding`` that waits until the test opens it, with a tick now and then as the real one has."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.opened = threading.Event()
        self.ended = threading.Event()

    def __call__(self, on_stage: OnStage) -> None:
        self.entered.set()
        try:
            while not self.opened.wait(0.01):
                on_stage(DECODING)
        finally:
            self.ended.set()


def fake_settings(folder: Path, **values: Any) -> Settings:
    """Settings of a small server on a free port, with one checkpoint that only the fake predictor can read."""
    checkpoint = folder / "fake.safetensors"
    checkpoint.touch()
    return Settings(**{"port": 0, "checkpoints": (f"fake={checkpoint}",), "device": ("cpu",), **values})


@contextmanager
def fake_server(folder: Path, predictor: FakePredictor | None = None, **values: Any) -> Iterator[RunningServer]:
    """A server that predicts with ``predictor``; ready when the body begins."""
    chosen = predictor or FakePredictor()
    with start_server(fake_settings(folder, **values), load=lambda path, device: chosen) as server:
        server.wait_ready(10)
        yield server


@contextmanager
def connect(server: RunningServer, **options: int) -> Iterator[ghn_pb2_grpc.GhnServiceStub]:
    """A stub of the server, made by the generator: no client code of ours is in between."""
    with grpc.insecure_channel(server.address, options=list(options.items())) as channel:
        yield ghn_pb2_grpc.GhnServiceStub(channel)


def predict_request(onnx_model: bytes, /, **fields: Any) -> ghn_pb2.PredictWeightsRequest:
    """A request for the weights of ``onnx_model``."""
    return ghn_pb2.PredictWeightsRequest(architecture=ghn_pb2.Architecture(onnx_model=onnx_model), **fields)


def code_of(call: Any) -> grpc.StatusCode:
    """How a call ends, or one that a function makes; a stream is read to its end."""
    try:
        answer = call() if callable(call) else call
        if isinstance(answer, Iterator):
            deque(answer, maxlen=0)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def receive_file(events: Any) -> bytes:
    """The file that a stream of events forms, put together without any check."""
    return b"".join(event.chunk.data for event in events if event.WhichOneof("event") == "chunk")
