"""Causes of failure: each has its own error, and only what may succeed later is tried again."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from ghn_client import GHNClient
from ghn_client.errors import (
    DeadlineExceededError,
    InvalidArchitectureError,
    InvalidOptionError,
    LimitExceededError,
    OverloadedError,
    ServerError,
    ServerUnavailableError,
    UnknownModelError,
)
from ghn_service import errors as service_errors
from ghn_service.server.app import RunningServer
from tests.server.fake_predictor import FakePredictor, Gate, fake_server, raises
from tests.server.patience import PATIENCE_S
from tests.server.small_models import TINY


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"model": "nothing"}, UnknownModelError),
        ({"dtype": "float8"}, InvalidOptionError),
        ({"seed": -1}, InvalidOptionError),
        ({"seed": 2**64}, InvalidOptionError),
        ({"steps": ["sharpen"]}, InvalidOptionError),
        ({"steps": ["noise:beta"]}, InvalidOptionError),
        ({"low_rank": {}}, InvalidOptionError),
        ({"low_rank": {"rank": 1, "energy": 0.5}}, InvalidOptionError),
        ({"low_rank": {"ranks": 1}}, InvalidOptionError),
        ({"include": ["nothing*"]}, InvalidOptionError),
        ({"timeout_s": -1.0}, InvalidOptionError),
    ],
)
def test_impossible_options_have_their_own_errors(options: dict, error: type[Exception], client: GHNClient) -> None:
    with pytest.raises(error):
        client.predict(TINY, **options)


def test_bytes_that_are_no_model_are_refused_here(client: GHNClient) -> None:
    with pytest.raises(InvalidArchitectureError):
        client.predict(b"nothing")


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (service_errors.PredictionError("NaN"), ServerError),
        (RuntimeError("a bug"), ServerError),
        (service_errors.LimitExceededError("too large"), LimitExceededError),
        (service_errors.InvalidArchitectureError("odd"), InvalidArchitectureError),
    ],
)
def test_failures_of_the_server_have_their_own_errors(
    raised: Exception, expected: type[Exception], tmp_path: Path
) -> None:
    with fake_server(tmp_path, FakePredictor(raises(raised))) as server, GHNClient(server.address) as client:
        with pytest.raises(expected) as caught:
            client.predict(TINY)
        assert caught.value.request_id


def test_a_reply_larger_than_accepted_is_refused(server: RunningServer) -> None:
    with GHNClient(server.address, max_bytes=100) as client, pytest.raises(LimitExceededError):
        client.predict(TINY)


def test_the_deadline_ends_a_call(tmp_path: Path) -> None:
    gate = Gate()
    with fake_server(tmp_path, FakePredictor(gate)) as server, GHNClient(server.address) as client:
        with pytest.raises(DeadlineExceededError):
            client.predict(TINY, timeout_s=0.3)
        gate.opened.set()


def test_an_absent_server_is_unavailable() -> None:
    with GHNClient("localhost:1", max_attempts=1) as client:
        with pytest.raises(ServerUnavailableError):
            client.predict(TINY)
        assert not client.health().alive


def test_a_server_that_comes_late_is_waited_for(tmp_path: Path) -> None:
    with fake_server(tmp_path) as first:
        address = first.address
    port = int(address.rpartition(":")[2])
    client = GHNClient(address, timeout_s=30.0, max_attempts=6)
    with pytest.raises(ServerUnavailableError):
        GHNClient(address, max_attempts=1).predict(TINY)
    with fake_server(tmp_path, port=port):
        assert len(client.predict(TINY)) == 6


def test_a_busy_server_is_asked_again(tmp_path: Path) -> None:
    failures = [service_errors.OverloadedError("busy")] * 2

    def busy_at_first(on_stage: object) -> None:
        if failures:
            raise failures.pop()

    with fake_server(tmp_path, FakePredictor(busy_at_first)) as server, GHNClient(server.address) as client:
        assert len(client.predict(TINY)) == 6


def test_a_server_without_a_free_thread_is_asked_again(tmp_path: Path) -> None:
    first, ended = threading.Event(), threading.Event()

    def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
        if not first.is_set():
            first.set()
            ended.wait(PATIENCE_S)
        return b""

    handler = grpc.method_handlers_generic_handler(
        "ghn.v1.GhnService", {"ListModels": grpc.unary_unary_rpc_method_handler(answer)}
    )
    server = grpc.server(ThreadPoolExecutor(2), maximum_concurrent_rpcs=1)
    server.add_generic_rpc_handlers((handler,))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    with GHNClient(address) as client, ThreadPoolExecutor(1) as pool:
        held = pool.submit(client.models)
        assert first.wait(PATIENCE_S)
        threading.Timer(0.3, ended.set).start()
        assert client.models() == held.result() == ()
    server.stop(None)


def test_a_server_that_stays_busy_is_given_up(tmp_path: Path) -> None:
    predictor = FakePredictor(raises(service_errors.OverloadedError("busy")))
    with fake_server(tmp_path, predictor) as server, GHNClient(server.address, max_attempts=2) as client:
        with pytest.raises(OverloadedError):
            client.predict(TINY)
        assert predictor.num_runs == 2


def test_a_refusal_is_not_repeated(tmp_path: Path) -> None:
    predictor = FakePredictor(raises(service_errors.InvalidArchitectureError("odd")))
    with fake_server(tmp_path, predictor) as server, GHNClient(server.address) as client:
        with pytest.raises(InvalidArchitectureError):
            client.predict(TINY)
        assert predictor.num_runs == 1
