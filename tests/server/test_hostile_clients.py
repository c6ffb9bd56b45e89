"""Clients that misbehave harm nobody but themselves; each test ends with a probe and a good request."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import grpc
import onnx
import psutil
import pytest
import torch

from ghn_client.wire import ghn_pb2
from ghn_service.hypernetwork.checkpoint import save_checkpoint
from ghn_service.server.app import RunningServer, start_server
from ghn_service.server.settings import Settings
from tests.hypernetwork.small_graphs import small_ghn
from tests.server.fake_predictor import FakePredictor, code_of, connect, fake_server, predict_request, receive_file
from tests.server.patience import PATIENCE_S, wait_until
from tests.server.small_models import LARGE, TINY, linear_model, model_with_operator
from tests.server.strangers import NOISE, hold_reflection, hold_watch, is_healthy, reading_process, say, tear_off

Code = grpc.StatusCode


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with fake_server(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(autouse=True)
def _server_is_well_afterwards(server: RunningServer) -> Iterator[None]:
    yield
    assert is_healthy(server.address)
    with connect(server) as stub:
        assert receive_file(stub.PredictWeights(predict_request(TINY), timeout=PATIENCE_S))


def num_connections() -> int:
    return len(psutil.Process().net_connections("tcp"))


# ---- connections ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", NOISE)
def test_noise_on_a_connection(server: RunningServer, what: str) -> None:
    connections = [say(server.address, NOISE[what]) for _ in range(5)]
    try:
        assert is_healthy(server.address)
    finally:
        for connection in connections:
            tear_off(connection)


def test_a_thousand_idle_connections(server: RunningServer) -> None:
    before = num_connections()
    connections = [say(server.address, b"") for _ in range(1000)]
    try:
        assert is_healthy(server.address)
    finally:
        for connection in connections:
            tear_off(connection)
    wait_until(lambda: num_connections() <= before + 10)


def test_connections_that_are_torn_off(server: RunningServer) -> None:
    before = num_connections()
    for _ in range(500):
        tear_off(say(server.address, NOISE["half a call"]))
    wait_until(lambda: num_connections() <= before + 10)


@pytest.mark.parametrize("size", [100, 100_000, 10_000_000])
def test_metadata_of_any_size(server: RunningServer, size: int) -> None:
    with connect(server) as stub:
        stream = stub.PredictWeights(predict_request(TINY), metadata=[("x-large", "y" * size)], timeout=PATIENCE_S)
        assert code_of(stream) in {Code.OK, Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE, Code.INTERNAL}


def test_odd_metadata(server: RunningServer) -> None:
    odd = [("authorization", "Bearer x"), ("x-bin", b"\xff\0"), ("grpc-accept-encoding", "magic"), ("te", "no")]
    with connect(server) as stub:
        for item in odd:
            assert code_of(stub.PredictWeights(predict_request(TINY), metadata=[item], timeout=PATIENCE_S)) is Code.OK


# ---- calls ----------------------------------------------------------------------------------------------------------


def test_a_storm_of_cancellations(server: RunningServer) -> None:
    with connect(server) as stub, ThreadPoolExecutor(8) as pool:

        def start_and_cancel(seed: int) -> None:
            stream = stub.PredictWeights(predict_request(TINY, seed=seed))
            if seed % 3:
                next(iter(stream), None) if seed % 3 == 1 else time.sleep(0.001)
            stream.cancel()

        def quietly(seed: int) -> None:
            try:
                start_and_cancel(seed)
            except grpc.RpcError as error:
                assert error.code() in {Code.CANCELLED, Code.RESOURCE_EXHAUSTED}  # noqa: PT017

        list(pool.map(quietly, range(400)))


@pytest.mark.parametrize("timeout_s", [1e-6, 0.001, 0.01])
def test_deadlines_that_nobody_can_meet(server: RunningServer, timeout_s: float) -> None:
    allowed = {Code.OK, Code.DEADLINE_EXCEEDED, Code.RESOURCE_EXHAUSTED, Code.CANCELLED}
    with connect(server) as stub:
        for seed in range(50):
            assert code_of(stub.PredictWeights(predict_request(LARGE, seed=seed), timeout=timeout_s)) in allowed


def test_a_deadline_in_the_stream(tmp_path: Path) -> None:
    with fake_server(tmp_path, max_seconds=1.0) as server, connect(server) as stub:
        stream = stub.PredictWeights(predict_request(LARGE))
        next(iter(stream))
        time.sleep(1.5)
        assert code_of(stream) in {Code.DEADLINE_EXCEEDED, Code.CANCELLED}
        assert receive_file(stub.PredictWeights(predict_request(TINY), timeout=PATIENCE_S))


def test_held_side_calls_are_no_obstacle(server: RunningServer) -> None:
    with grpc.insecure_channel(server.address) as channel:
        held = [hold(channel) for _ in range(60) for hold in (hold_reflection, hold_watch)]
        try:
            assert is_healthy(server.address)
        finally:
            for call in held:
                call.cancel()


def test_a_client_that_is_killed_in_the_middle_of_a_stream(tmp_path: Path) -> None:
    drawn: list[weakref.ref[torch.Tensor]] = []

    def draw(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        tensor = torch.zeros(shape)
        drawn.append(weakref.ref(tensor))
        return tensor

    with fake_server(tmp_path, FakePredictor(draw=draw), cache_bytes=0) as server:
        with reading_process(server.address, LARGE):
            assert any(reference() is not None for reference in drawn)
        wait_until(lambda: all(reference() is None for reference in drawn))


def test_a_compressed_request_is_not_unpacked(server: RunningServer) -> None:
    with connect(server) as stub:
        stream = stub.PredictWeights(predict_request(bytes(10 << 20)), compression=grpc.Compression.Gzip)
        assert code_of(stream) is Code.UNIMPLEMENTED


def test_requests_that_are_no_calls_of_ours(server: RunningServer) -> None:
    with grpc.insecure_channel(server.address) as channel:
        for method in ("/ghn.v1.GhnService/", "/ghn.v1.GhnService/../x", "/" + "x" * 5000, "/grpc.health.v1.Health/No"):
            call = partial(channel.unary_unary(method), b"", timeout=PATIENCE_S)
            assert code_of(call) is Code.UNIMPLEMENTED


def test_more_messages_than_one(server: RunningServer) -> None:
    request = predict_request(TINY).SerializeToString()
    with grpc.insecure_channel(server.address) as channel:
        for method, messages in (("ListModels", [b"", b"", b""]), ("PredictWeights", [request] * 3)):
            stream = channel.stream_stream(f"/ghn.v1.GhnService/{method}")(iter(messages), timeout=PATIENCE_S)
            assert code_of(stream) in {Code.OK, Code.INTERNAL, Code.UNIMPLEMENTED, Code.INVALID_ARGUMENT}


# ---- what they send -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op_type", ["Magic", "Relu"])
def test_operators_that_nobody_knows_are_passed_over_and_named(server: RunningServer, op_type: str) -> None:
    architecture = ghn_pb2.Architecture(onnx_model=model_with_operator(op_type, "custom"))
    with connect(server) as stub:
        answer = stub.AnalyzeArchitecture(ghn_pb2.AnalyzeArchitectureRequest(architecture=architecture))
    assert list(answer.unknown_operators) == [f"custom::{op_type}"]


def test_no_file_is_opened_for_external_data(server: RunningServer, tmp_path: Path) -> None:
    """Whoever opened the pipe would wait for ever, whether by its path, through a link or from the working folder."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    model = onnx.load_model_from_string(linear_model(6, 5))
    for value in list(model.graph.input)[1:]:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        tensor = model.graph.initializer.add(name=value.name, dims=shape, data_type=1)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=str(tmp_path / ("link" if len(shape) == 2 else "pipe")))
    with connect(server) as stub:
        assert receive_file(stub.PredictWeights(predict_request(model.SerializeToString()), timeout=PATIENCE_S))


def test_values_that_are_not_finite_are_never_streamed(tmp_path: Path) -> None:
    ghn = small_ghn()
    with torch.no_grad():
        for parameter in ghn.parameters():
            parameter.fill_(float("nan"))
    checkpoint = tmp_path / "nan.safetensors"
    save_checkpoint(ghn, checkpoint)
    with start_server(Settings(port=0, checkpoints=(str(checkpoint),), device=("cpu",))) as server:
        server.wait_ready(PATIENCE_S)
        with connect(server) as stub:
            kinds = []
            with pytest.raises(grpc.RpcError) as caught:
                kinds.extend(event.WhichOneof("event") for event in stub.PredictWeights(predict_request(TINY)))
        assert caught.value.code() is Code.INTERNAL
        assert not {"header", "chunk"} & set(kinds)


def test_a_clock_that_jumps_ends_nothing(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with connect(server) as stub:
        stream = stub.PredictWeights(predict_request(LARGE, seed=77), timeout=PATIENCE_S)
        next(iter(stream))
        real = time.time
        for jump in (86_400, -86_400):
            monkeypatch.setattr(time, "time", lambda jump=jump: real() + jump)
            time.sleep(0.05)
        assert code_of(stream) is Code.OK


@pytest.mark.slow
def test_a_layer_of_more_than_two_gibibytes(tmp_path: Path) -> None:
    """Its zeros are one page of the kernel, so that it fits any machine."""

    predictor = FakePredictor(draw=lambda shape, generator: torch.zeros(shape))
    with fake_server(tmp_path, predictor) as server, connect(server) as stub:
        size = 0
        for event in stub.PredictWeights(predict_request(linear_model(32768, 20480))):
            size += len(event.chunk.data)
        assert size > 2**31
        assert event.WhichOneof("event") == "trailer"
