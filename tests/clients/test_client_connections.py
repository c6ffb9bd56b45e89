"""Where a client connects to, with which secrets, and what it survives: closing, forks, a server that vanishes."""

from __future__ import annotations

import multiprocessing
import pickle
import socket
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from ghn_client import GHNClient, connection
from ghn_client.errors import AuthenticationError, InvalidOptionError, ServerUnavailableError
from ghn_service.server.app import RunningServer, start_server
from ghn_service.server.settings import Settings
from tests.server.fake_predictor import FakePredictor, Gate, fake_server, fake_settings
from tests.server.freezing_proxy import freezing_proxy
from tests.server.patience import PATIENCE_S, wait_until
from tests.server.small_models import TINY


@pytest.mark.parametrize(
    "address",
    [
        "gpu-server:50051",
        "dns:///gpu-server:50051",
        "10.0.0.1:50051",
        "ipv4:127.0.0.1:1,10.0.0.1:1",
        "dns://8.8.8.8/localhost:1",
        "dns://localhost:1",
        "xds:///localhost:1",
    ],
)
def test_a_token_does_not_travel_in_plain_text(address: str) -> None:
    with pytest.raises(AuthenticationError):
        GHNClient(address, token="secret")


@pytest.mark.parametrize(
    "address",
    [
        "localhost:1",
        "http://localhost:1/",
        "127.0.0.1:1",
        "[::1]:1",
        "unix:/tmp/socket",
        "dns:localhost:1",
        "dns:///localhost:1",
        "ipv4:127.0.0.1:1,127.0.0.1:2",
    ],
)
def test_a_token_may_go_to_this_machine(address: str) -> None:
    GHNClient(address, token="secret").close()


def test_a_token_for_this_machine_passes_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_grpc_proxy", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as proxy, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # a port where nobody listens
        monkeypatch.setenv("grpc_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        proxy.settimeout(0)
        with (
            GHNClient(f"localhost:{closed.getsockname()[1]}", token="secret", max_attempts=1, timeout_s=5) as client,
            pytest.raises(ServerUnavailableError),
        ):
            client.models()
        with pytest.raises(BlockingIOError):
            proxy.accept()


def test_a_token_may_travel_encrypted() -> None:
    GHNClient("gpu-server:50051", token="secret", tls=True).close()


@pytest.mark.parametrize("token", ["two words", "line\nbreak", "schlüssel"])
def test_a_token_that_cannot_be_sent_is_refused_without_being_shown(token: str) -> None:
    with pytest.raises(AuthenticationError) as caught:
        GHNClient("localhost:1", token=token)
    assert token not in str(caught.value)


def test_an_empty_address_is_refused() -> None:
    with pytest.raises(InvalidOptionError):
        GHNClient(" ")


def test_a_missing_certificate_is_an_authentication_error(tmp_path: Path) -> None:
    with GHNClient("localhost:1", root_certificates=tmp_path / "ca.pem") as client, pytest.raises(AuthenticationError):
        client.predict(TINY)


def test_a_client_can_be_used_again_after_close(server: RunningServer) -> None:
    client = GHNClient(server.address)
    for _ in range(2):
        assert len(client.predict(TINY)) == 6
        client.close()


def predict_in_child(client: GHNClient, results: multiprocessing.Queue) -> None:
    results.put(bytes(client.predict(TINY, timeout_s=20).buffer))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_another_process_may_use_the_client(method: str, client: GHNClient) -> None:
    expected = bytes(client.predict(TINY).buffer)
    context = multiprocessing.get_context(method)
    results = context.Queue()
    child = context.Process(target=predict_in_child, args=(client, results))
    child.start()
    assert results.get(timeout=200) == expected
    child.join()
    assert child.exitcode == 0
    assert bytes(client.predict(TINY).buffer) == expected


def test_a_client_can_be_pickled(client: GHNClient) -> None:
    assert pickle.loads(pickle.dumps(client)).predict(TINY).buffer == client.predict(TINY).buffer


def test_a_server_that_vanishes_during_a_call_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    eager = {"grpc.keepalive_time_ms": 100, "grpc.keepalive_timeout_ms": 200, "grpc.http2.ping_timeout_ms": 200}
    monkeypatch.setattr(connection, "_OPTIONS", tuple({**dict(connection._OPTIONS), **eager}.items()))
    gate = Gate()
    with (
        fake_server(tmp_path, FakePredictor(gate), min_ping_seconds=0.0) as server,
        freezing_proxy(server.address) as proxy,
        GHNClient(proxy.address, max_attempts=1, timeout_s=10 * PATIENCE_S) as client,
    ):
        freezer = threading.Thread(target=lambda: gate.entered.wait(PATIENCE_S) and proxy.freeze())
        freezer.start()
        with pytest.raises(ServerUnavailableError):
            client.predict(TINY)
        freezer.join()
        gate.opened.set()


@pytest.mark.parametrize("target", ["ipv4:{},{},{}", "ipv4:{2},{1},{0}"])
def test_calls_go_in_turn_to_the_servers_that_are_ready(tmp_path: Path, target: str) -> None:
    may_load, predictors = threading.Event(), [FakePredictor(), FakePredictor()]
    with ExitStack() as stack:
        servers = [stack.enter_context(fake_server(tmp_path, predictor)) for predictor in predictors]
        settings = fake_settings(tmp_path)

        def load(path: Path, device: str) -> FakePredictor:
            may_load.wait(PATIENCE_S)
            return FakePredictor()

        loading = stack.enter_context(start_server(settings, load=load))
        stack.callback(may_load.set)
        address = target.format(*(server.address for server in (*servers, loading)))
        client = stack.enter_context(GHNClient(address, max_attempts=1))
        wait_until(lambda: client.health().ready)
        for seed in range(20):
            client.predict(TINY, seed=seed)
    assert min(predictor.num_runs for predictor in predictors) >= 5


def test_pings_of_the_client_are_rarer_than_a_server_allows() -> None:
    assert 2 * 1000 * Settings().min_ping_seconds < connection.KEEPALIVE_MS
