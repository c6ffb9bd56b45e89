"""A stranger's server: a process, a checkpoint, a socket."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import safetensors.torch
import torch

from ghn_client.wire import ghn_pb2, ghn_pb2_grpc
from ghn_client.wire.codec import decode_safetensors_header, open_prediction_stream, receive_stream
from ghn_client.wire.metadata import decode_metadata
from ghn_service.hypernetwork.checkpoint import save_checkpoint
from ghn_service.predictor import PredictionOptions, Predictor
from ghn_service.server.app import start_server
from ghn_service.server.settings import Settings
from tests.end_to_end.server_process import ServerProcess, running_server, server_command, server_environment
from tests.hypernetwork.small_graphs import small_ghn
from tests.server.fake_predictor import predict_request, receive_file
from tests.server.small_models import LARGE, TINY

pytestmark = pytest.mark.xdist_group("server process")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "small.safetensors"
    save_checkpoint(small_ghn(), path)
    return path


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[ServerProcess]:
    with running_server(checkpoint) as running:
        yield running


@pytest.fixture
def channel(server: ServerProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as connected:
        yield connected


def predict(channel: grpc.Channel, onnx_model: bytes, **fields: object) -> bytes:
    """The file that the server sends, received and checked by our codec."""
    events = open_prediction_stream(channel)(predict_request(onnx_model, **fields), timeout=60)
    return bytes(receive_stream(events, max_bytes=1 << 30)[0])


def test_the_weights_are_those_of_the_predictor(channel: grpc.Channel, checkpoint: Path) -> None:
    options = PredictionOptions(seed=4)
    expected = Predictor.from_checkpoint(checkpoint, device="cpu").predict(TINY, options=options)
    found = safetensors.torch.load(predict(channel, TINY, seed=4))
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_another_process_gives_the_same_bytes(channel: grpc.Channel, checkpoint: Path) -> None:
    settings = Settings(port=0, checkpoints=(str(checkpoint),), device=("cpu",))
    with start_server(settings) as second:
        second.wait_ready(60)
        with grpc.insecure_channel(second.address) as other:
            assert predict(other, TINY, seed=1) == predict(channel, TINY, seed=1)


def test_two_workers_give_the_same_bytes_at_once(channel: grpc.Channel, checkpoint: Path) -> None:
    expected = [predict(channel, TINY, seed=seed) for seed in range(6)]
    settings = Settings(port=0, checkpoints=(str(checkpoint),), device=("cpu", "cpu"))
    with start_server(settings) as second, ThreadPoolExecutor(6) as callers:
        second.wait_ready(60)
        with grpc.insecure_channel(second.address) as other:
            info = ghn_pb2_grpc.GhnServiceStub(other).GetServerInfo(ghn_pb2.GetServerInfoRequest())
            assert list(info.devices) == ["cpu", "cpu"]
            calls = [callers.submit(predict, other, TINY, seed=seed) for seed in range(6)]
            assert [call.result() for call in calls] == expected


def test_a_step_draws_from_the_seed(channel: grpc.Channel) -> None:
    steps = [ghn_pb2.PostProcessingStep(name="noise")]
    first, again, other = (safetensors.torch.load(predict(channel, TINY, seed=seed, steps=steps)) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_the_file_records_its_steps(channel: grpc.Channel) -> None:
    events = open_prediction_stream(channel)(
        predict_request(TINY, steps=[ghn_pb2.PostProcessingStep(name="noise", options={"beta": "0.5"})]), timeout=60
    )
    _, metadata = decode_safetensors_header(receive_stream(events, max_bytes=1 << 30)[0])
    (step,) = decode_metadata(metadata).steps
    assert (step["name"], step["options"]["beta"]) == ("noise", 0.5)


def test_low_rank_factors_are_streamed(channel: grpc.Channel) -> None:
    low_rank = ghn_pb2.LowRankOutput(rank=2, method=ghn_pb2.LOW_RANK_METHOD_SPECTRAL)
    names = set(safetensors.torch.load(predict(channel, LARGE, low_rank=low_rank)))
    assert any(".factor_" in name for name in names)


def test_a_plain_client_can_put_the_chunks_together(channel: grpc.Channel) -> None:
    stream = ghn_pb2_grpc.GhnServiceStub(channel).PredictWeights(predict_request(TINY, seed=9), timeout=60)
    assert receive_file(stream) == predict(channel, TINY, seed=9)


def test_a_bad_request_leaves_the_server_as_it_was(channel: grpc.Channel, server: ServerProcess) -> None:
    before = predict(channel, TINY)
    with pytest.raises(grpc.RpcError) as caught:
        predict(channel, b"nonsense")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert predict(channel, TINY) == before
    assert server.process.poll() is None


def test_our_client_finds_it_healthy(server: ServerProcess) -> None:
    command = [sys.executable, "-m", "ghn_client", "health", "--address", server.address]
    assert subprocess.run(command, env=server_environment(), timeout=60, check=False).returncode == 0


@pytest.fixture
def number(request: pytest.FixtureRequest) -> Iterator[signal.Signals]:
    """A signal that processes started now do not inherit as ignored, as they would of a shell's background job."""
    before = signal.signal(request.param, signal.SIG_DFL)
    yield request.param
    signal.signal(request.param, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], indirect=True)
def test_a_signal_lets_the_stream_finish(checkpoint: Path, number: signal.Signals) -> None:
    with running_server(checkpoint) as server, grpc.insecure_channel(server.address) as channel:
        stream = open_prediction_stream(channel)(predict_request(LARGE), timeout=60)
        first = next(stream)
        server.process.send_signal(number)

        def rest() -> Iterator[bytes]:
            yield first
            yield from stream

        buffer, _ = receive_stream(rest(), max_bytes=1 << 30)
        assert len(buffer) > 40 << 20
        assert server.wait() == 0
        events = [line["event"] for line in server.log]
        assert events.index("stopping") < events.index("stopped")


def test_a_killed_server_is_unavailable(checkpoint: Path) -> None:
    with running_server(checkpoint) as server, grpc.insecure_channel(server.address) as channel:
        stream = open_prediction_stream(channel)(predict_request(LARGE), timeout=60)
        next(stream)
        server.process.kill()
        with pytest.raises(grpc.RpcError) as caught:
            list(stream)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_a_taken_port_ends_the_command_with_one_line(checkpoint: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = subprocess.run(
            server_command("--port", port, "--checkpoint", str(checkpoint)),
            env=server_environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
