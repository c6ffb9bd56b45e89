"""Metrics count what happened, and are there for whoever asks; traces have a span for each call."""

from __future__ import annotations

import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from ghn_client.wire import ghn_pb2, ghn_pb2_grpc
from ghn_service.errors import ConfigurationError
from ghn_service.server.app import RunningServer
from tests.server.fake_predictor import (
    SUMMARY,
    FakePredictor,
    Gate,
    connect,
    fake_server,
    predict_request,
    receive_file,
)
from tests.server.patience import PATIENCE_S, wait_until
from tests.server.small_models import TINY
from tests.server.strangers import say


def value(server: RunningServer, name: str, **labels: str) -> float:
    """A sample; 0 if there is none."""
    return server.metrics.registry.get_sample_value(name, labels) or 0.0


def num_calls(server: RunningServer, method: str, code: str, reason: str = "") -> float:
    return value(server, "ghn_requests_total", method=method, code=code, reason=reason)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    with fake_server(tmp_path) as running:
        yield running


def test_calls_are_counted_by_method_code_and_reason(server: RunningServer) -> None:
    with connect(server) as stub:
        for _ in range(2):
            receive_file(stub.PredictWeights(predict_request(TINY)))
        with pytest.raises(grpc.RpcError):
            receive_file(stub.PredictWeights(predict_request(b"")))
        with pytest.raises(grpc.RpcError):
            receive_file(stub.PredictWeights(predict_request(TINY, model="nobody")))
        stub.ListModels(ghn_pb2.ListModelsRequest())
    wait_until(lambda: num_calls(server, "PredictWeights", "NOT_FOUND", "UNKNOWN_MODEL") == 1)
    assert num_calls(server, "PredictWeights", "OK") == 2
    assert num_calls(server, "PredictWeights", "INVALID_ARGUMENT", "INVALID_ARCHITECTURE") == 1
    wait_until(lambda: num_calls(server, "ListModels", "OK") == 1)
    assert value(server, "ghn_request_seconds_count", method="PredictWeights") == 4
    assert value(server, "ghn_requests_in_progress", method="PredictWeights") == 0


def test_health_and_reflection_are_counted(server: RunningServer) -> None:
    with grpc.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        health.Check(health_pb2.HealthCheckRequest(service=""), timeout=PATIENCE_S)
        with pytest.raises(grpc.RpcError):
            health.Check(health_pb2.HealthCheckRequest(service="nobody"), timeout=PATIENCE_S)
        watch = health.Watch(health_pb2.HealthCheckRequest(service=""))
        next(watch)
        assert value(server, "ghn_requests_in_progress", method="Watch") == 1
        watch.cancel()
        reflect = reflection_pb2.ServerReflectionRequest(list_services="")
        list(reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([reflect])))
    wait_until(lambda: num_calls(server, "Watch", "CANCELLED", "CANCELLED") == 1)
    wait_until(lambda: num_calls(server, "ServerReflectionInfo", "OK") == 1)
    assert (num_calls(server, "Check", "OK"), num_calls(server, "Check", "NOT_FOUND")) == (1, 1)


def test_names_that_clients_make_up_share_one_series(server: RunningServer) -> None:
    with grpc.insecure_channel(server.address) as channel:
        for name in ("One", "Two"):
            with pytest.raises(grpc.RpcError):
                channel.unary_unary(f"/ghn.v1.GhnService/{name}")(b"")
    assert num_calls(server, "other", "UNIMPLEMENTED") == 2


def test_bytes_stages_and_first_chunks_are_those_of_the_stream(server: RunningServer) -> None:
    with connect(server) as stub:
        events = list(stub.PredictWeights(predict_request(TINY)))
    wait_until(lambda: num_calls(server, "PredictWeights", "OK") == 1)
    chunks = [event for event in events if event.WhichOneof("event") == "chunk"]
    sent = sum(len(_without_length(event)) for event in chunks)
    assert value(server, "ghn_stream_bytes_total") == sent
    assert value(server, "ghn_first_chunk_seconds_count") == 1
    (trailer,) = [event.trailer for event in events if event.WhichOneof("event") == "trailer"]
    for stage, seconds in trailer.seconds.items():
        assert value(server, "ghn_stage_seconds_count", stage=stage) == 1
        assert value(server, "ghn_stage_seconds_sum", stage=stage) == seconds
    assert value(server, "ghn_streams") == 0


def _without_length(event: Message) -> bytes:
    """What a chunk's event is on the wire."""
    return event.SerializeToString()


def test_queue_and_workers_are_shown_as_they_are(tmp_path: Path) -> None:
    gate = Gate()
    with fake_server(tmp_path, FakePredictor(gate), device=("cpu", "cpu")) as server, connect(server) as stub:
        assert (value(server, "ghn_workers"), value(server, "ghn_workers_alive")) == (2, 2)
        streams = [stub.PredictWeights(predict_request(TINY, seed=seed)) for seed in range(5)]
        wait_until(lambda: value(server, "ghn_queue_depth") == 3)
        assert value(server, "ghn_requests_in_progress", method="PredictWeights") == 5
        assert value(server, "ghn_memory_used_bytes") > 0
        assert value(server, "ghn_call_places_taken", kind="prediction") == 5
        gate.opened.set()
        assert all(receive_file(stream) for stream in streams)
        wait_until(lambda: value(server, "ghn_queue_depth") == 0)


def test_equal_requests_are_hits(server: RunningServer) -> None:
    with connect(server) as stub:
        for _ in range(3):
            receive_file(stub.PredictWeights(predict_request(TINY)))
    assert (value(server, "ghn_cache_misses_total"), value(server, "ghn_cache_hits_total")) == (1, 2)
    assert 0 < value(server, "ghn_cache_bytes") <= value(server, "ghn_memory_used_bytes")
    assert value(server, "ghn_memory_bytes") == server.memory.total


def test_the_digest_of_each_hypernetwork_is_shown(server: RunningServer) -> None:
    labels = {"model": "fake", "kind": SUMMARY.kind, "digest": SUMMARY.digest}
    assert value(server, "ghn_model_info", **labels) == 1


def test_refused_calls_are_counted(tmp_path: Path) -> None:
    (tokens := tmp_path / "tokens").write_text("alice " + "0" * 64)
    with fake_server(tmp_path, tokens=tokens) as server, connect(server) as stub:
        with pytest.raises(grpc.RpcError):
            stub.ListModels(ghn_pb2.ListModelsRequest())
        wait_until(lambda: num_calls(server, "ListModels", "UNAUTHENTICATED", "UNAUTHENTICATED") == 1)


def test_metrics_are_served_if_asked_for(tmp_path: Path) -> None:
    with fake_server(tmp_path) as server:
        assert server.metrics.address == ""
    with fake_server(tmp_path, metrics_port=0) as server:
        assert server.metrics.address.startswith("127.0.0.1:")
        url = f"http://{server.metrics.address}/metrics"
        with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:
            families = {family.name for family in text_string_to_metric_families(answer.read().decode())}
        assert {"ghn_requests", "ghn_workers_alive", "process_resident_memory_bytes"} <= families
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(url, timeout=PATIENCE_S)


def test_a_taken_port_for_metrics_is_an_error(tmp_path: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(ConfigurationError),
        fake_server(tmp_path, metrics_port=taken.getsockname()[1]),
    ):
        pass


@contextmanager
def spans_in_memory() -> Iterator[list]:
    """What a program that traces gets."""
    trace = pytest.importorskip("opentelemetry.trace")
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    export = pytest.importorskip("opentelemetry.sdk.trace.export")
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter").InMemorySpanExporter()
    provider = sdk.TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(memory))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "get_tracer_provider", lambda: provider)
        spans: list = []
        yield spans
        spans += memory.get_finished_spans()


def test_traces_have_a_span_for_each_call_but_health(tmp_path: Path) -> None:
    pytest.importorskip("opentelemetry.instrumentation.grpc")
    with (
        spans_in_memory() as spans,
        fake_server(tmp_path, tracing=True) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = ghn_pb2_grpc.GhnServiceStub(channel)
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=""))
        assert receive_file(stub.PredictWeights(predict_request(TINY)))
        with pytest.raises(grpc.RpcError):
            receive_file(stub.PredictWeights(predict_request(b"")))
    found = [(span.name, span.attributes["rpc.grpc.status_code"]) for span in spans]
    name = "/ghn.v1.GhnService/PredictWeights"
    assert found == [(name, grpc.StatusCode.OK.value[0]), (name, grpc.StatusCode.INVALID_ARGUMENT.value[0])]


def test_a_silent_connection_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ghn_service.server.metrics.HTTP_IDLE_S", 0.2)
    with fake_server(tmp_path, metrics_port=0) as server, say(server.metrics.address, b"GET /metr") as connection:
        assert connection.recv(1) == b""
