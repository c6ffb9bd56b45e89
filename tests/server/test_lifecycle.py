"""Start, readiness and stop of a server inside the process."""

from __future__ import annotations

import queue
import threading
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from ghn_client.wire import ghn_pb2, ghn_pb2_grpc
from ghn_service.errors import (
    CheckpointError,
    ConfigurationError,
    DeviceLostError,
    InvalidOptionError,
    UnavailableError,
)
from ghn_service.server.app import RunningServer, serve, start_server
from ghn_service.server.settings import Settings
from tests.server.fake_predictor import (
    SUMMARY,
    FakePredictor,
    Gate,
    code_of,
    connect,
    fake_server,
    fake_settings,
    predict_request,
    raises,
    receive_file,
)
from tests.server.patience import PATIENCE_S, wait_until
from tests.server.small_models import TINY

SERVICE = "ghn.v1.GhnService"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def health(server: RunningServer, service: str) -> int:
    with grpc.insecure_channel(server.address) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(service=service), timeout=PATIENCE_S
        )
        status: int = answer.status
        return status


def code_of_a_call(stub: ghn_pb2_grpc.GhnServiceStub) -> grpc.StatusCode:
    """Status of a small call; one that meets the very moment of the stop waits for the end of the grace."""
    return code_of(lambda: stub.ListModels(ghn_pb2.ListModelsRequest(), timeout=0.5))


def test_alive_before_ready(tmp_path: Path) -> None:
    may_load = threading.Event()

    def load(path: Path, device: str) -> FakePredictor:
        may_load.wait(PATIENCE_S)
        return FakePredictor()

    with start_server(fake_settings(tmp_path), load=load) as server, connect(server) as stub:
        assert (health(server, ""), health(server, SERVICE)) == (SERVING, NOT_SERVING)
        assert code_of(stub.PredictWeights(predict_request(TINY))) is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(UnavailableError):
            server.wait_ready(0.01)
        may_load.set()
        server.wait_ready(PATIENCE_S)
        assert health(server, SERVICE) == SERVING


def test_not_ready_without_a_hypernetwork(tmp_path: Path) -> None:
    def load(path: Path, device: str) -> FakePredictor:
        raise ValueError("no such thing")

    with start_server(fake_settings(tmp_path), load=load) as server:
        with pytest.raises(CheckpointError):
            server.wait_ready(PATIENCE_S)
        assert (health(server, ""), health(server, SERVICE)) == (SERVING, NOT_SERVING)


@pytest.mark.parametrize("is_right", [True, False])
def test_only_the_checkpoint_of_the_given_digest_is_served(tmp_path: Path, is_right: bool) -> None:
    digest = SUMMARY.digest if is_right else "0" * 64
    settings = fake_settings(tmp_path)
    settings = settings.model_copy(update={"checkpoints": (f"{settings.checkpoints[0]}@sha256:{digest}",)})
    with start_server(settings, load=lambda path, device: FakePredictor()) as server, connect(server) as stub:
        if is_right:
            server.wait_ready(PATIENCE_S)
        else:
            with pytest.raises(CheckpointError):
                server.wait_ready(PATIENCE_S)
        found = stub.ListModels(ghn_pb2.ListModelsRequest(), timeout=PATIENCE_S).models
        assert [model.digest for model in found] == ([digest] if is_right else [])


def test_health_of_an_unknown_service(tmp_path: Path) -> None:
    with fake_server(tmp_path) as server, pytest.raises(grpc.RpcError) as caught:
        health(server, "nobody")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("is_on", [True, False])
def test_reflection_is_a_choice(tmp_path: Path, is_on: bool) -> None:
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    with fake_server(tmp_path, reflection=is_on) as server, grpc.insecure_channel(server.address) as channel:
        answers = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request]))
        if is_on:
            names = {service.name for service in next(answers).list_services_response.service}
            assert SERVICE in names
        else:
            assert code_of(lambda: next(answers)) is grpc.StatusCode.UNIMPLEMENTED


def test_a_taken_port_is_an_error(tmp_path: Path) -> None:
    with fake_server(tmp_path) as server:
        port = int(server.address.rpartition(":")[2])
        with pytest.raises(ConfigurationError):
            start_server(fake_settings(tmp_path, port=port))


def test_no_checkpoint_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ghn_service.server.settings.BUNDLED_CHECKPOINTS", tmp_path)
    with pytest.raises(ConfigurationError):
        start_server(Settings(port=0))


def test_an_unknown_device_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidOptionError):
        start_server(fake_settings(tmp_path, device=("cuda:99",)))


def test_two_devices_have_a_worker_and_a_copy_each(tmp_path: Path) -> None:
    gate, copies = Gate(), []

    def load(path: Path, device: str) -> FakePredictor:
        copies.append(FakePredictor(gate))
        return copies[-1]

    settings = fake_settings(tmp_path, device=("cpu", "cpu"))
    with start_server(settings, load=load) as server, connect(server) as stub:
        server.wait_ready(PATIENCE_S)
        streams = [stub.PredictWeights(predict_request(TINY, seed=seed)) for seed in range(2)]
        for stream in streams:
            while next(stream).progress.stage != ghn_pb2.STAGE_PREDICTING:
                pass
        gate.opened.set()
        assert all(receive_file(stream) for stream in streams)
    assert [copy.num_runs for copy in copies] == [1, 1]


def test_stopping_finishes_what_runs_and_refuses_the_rest(tmp_path: Path) -> None:
    gate = Gate()
    with fake_server(tmp_path, FakePredictor(gate)) as server, connect(server) as stub:
        running = stub.PredictWeights(predict_request(TINY))
        assert gate.entered.wait(PATIENCE_S)
        stopper = threading.Thread(target=server.stop, kwargs={"grace_s": PATIENCE_S})
        stopper.start()
        wait_until(lambda: code_of_a_call(stub) is grpc.StatusCode.UNAVAILABLE)
        gate.opened.set()
        assert receive_file(running)
        stopper.join(PATIENCE_S)
        assert not stopper.is_alive()


def test_stopping_ends_what_does_not_finish_in_its_grace(tmp_path: Path) -> None:
    gate = Gate()
    with fake_server(tmp_path, FakePredictor(gate)) as server, connect(server) as stub:
        running = stub.PredictWeights(predict_request(TINY))
        assert gate.entered.wait(PATIENCE_S)
        server.stop(grace_s=0.05)
        with pytest.raises(grpc.RpcError) as caught:
            list(running)
    assert caught.value.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}


def test_a_stopped_server_leaves_no_thread_of_ours(tmp_path: Path) -> None:
    with fake_server(tmp_path) as server, connect(server) as stub:
        assert receive_file(stub.PredictWeights(predict_request(TINY)))
    names = ("ghn-worker", "ghn-watchdog", "ghn-loader")
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith(names)]


def test_stopping_twice_is_harmless(tmp_path: Path) -> None:
    with fake_server(tmp_path) as server:
        server.stop(0.0)
        server.stop(0.0)


# ---- a device that is lost ------------------------------------------------------------------------------------------


def test_a_lost_device_ends_readiness(tmp_path: Path) -> None:
    predictor = FakePredictor(before_decoding=raises(DeviceLostError("cuda:0 failed for good")))
    with fake_server(tmp_path, predictor) as server, connect(server) as stub:
        for code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE):
            assert code_of(stub.PredictWeights(predict_request(TINY), timeout=PATIENCE_S)) is code
        wait_until(lambda: health(server, SERVICE) == NOT_SERVING)


def test_the_other_device_goes_on(tmp_path: Path) -> None:
    predictor = FakePredictor(before_decoding=raises(DeviceLostError("cuda:0 failed for good")))
    with fake_server(tmp_path, predictor, device=("cpu", "cpu")) as server, connect(server) as stub:
        with pytest.raises(grpc.RpcError):
            list(stub.PredictWeights(predict_request(TINY), timeout=PATIENCE_S))
        predictor.before_decoding = lambda on_stage: None
        assert receive_file(stub.PredictWeights(predict_request(TINY), timeout=PATIENCE_S))
        assert health(server, SERVICE) == SERVING


def test_the_command_ends_with_a_lost_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = FakePredictor(before_decoding=raises(DeviceLostError("cuda:0 failed for good")))
    started: queue.SimpleQueue[RunningServer] = queue.SimpleQueue()

    def start(settings: Settings) -> RunningServer:
        server = start_server(settings, load=lambda path, device: predictor)
        started.put(server)
        return server

    def predict() -> None:
        server = started.get(timeout=PATIENCE_S)
        server.wait_ready(PATIENCE_S)
        with connect(server) as stub, pytest.raises(grpc.RpcError):
            list(stub.PredictWeights(predict_request(TINY), timeout=PATIENCE_S))

    monkeypatch.setattr("ghn_service.server.app.start_server", start)
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    client = threading.Thread(target=predict)
    client.start()
    with pytest.raises(DeviceLostError):
        serve(fake_settings(tmp_path))
    client.join()
