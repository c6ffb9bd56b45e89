"""What a server tells about itself: metrics in Prometheus' format, and traces in OpenTelemetry's.

Each server has a registry of its own, so that several fit into one process. ``deploy/`` has a dashboard and alerts over
these names.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import grpc
import torch
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ghn_client.wire import ghn_pb2
from ghn_service.errors import ConfigurationError
from ghn_service.server.admission import Budget, Gate
from ghn_service.server.models import ModelRegistry
from ghn_service.server.queue import WorkQueue
from ghn_service.server.reply import VERSION
from ghn_service.server.settings import usable
from ghn_service.server.sharing import SharedReplies

METHODS = {
    method.name
    for descriptor in (ghn_pb2.DESCRIPTOR, health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR)
    for service in descriptor.services_by_name.values()
    for method in service.methods
}
OTHER_METHOD = "other"
HTTP_IDLE_S = 10.0
"""Seconds that a connection may say nothing: each has a thread."""
SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)


class Metrics:
    """The metrics of one server.

    Attributes:
        registry: All of them.
        address: Where they are served; "" for nowhere.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.address = ""
        self._close: Callable[[], None] = lambda: None
        kinds: dict[str, Any] = {"registry": self.registry}
        self._requests = Counter(
            "ghn_requests", "Calls that have ended, health and reflection too", ("method", "code", "reason"), **kinds
        )
        self._running = Gauge("ghn_requests_in_progress", "Calls that have not ended", ("method",), **kinds)
        kinds["buckets"] = SECONDS
        self._seconds = Histogram("ghn_request_seconds", "Seconds from first to last byte", ("method",), **kinds)
        self._stages = Histogram("ghn_stage_seconds", "Seconds of a prediction in a stage", ("stage",), **kinds)
        self._first_chunk = Histogram("ghn_first_chunk_seconds", "Seconds from the request to its first chunk", **kinds)
        del kinds["buckets"]
        self._streams = Gauge("ghn_streams", "Predictions that are being sent", **kinds)
        self._bytes = Counter("ghn_stream_bytes", "Bytes of weights that have been sent", **kinds)
        ProcessCollector(registry=self.registry)

    def running(self, method: str) -> AbstractContextManager[None]:
        """Counts a call as in progress while the body serves it."""
        return self._running.labels(_known(method)).track_inprogress()

    def count(self, method: str, code: str, reason: str = "", *, seconds: float = 0.0) -> None:
        """Counts a call that has ended."""
        self._requests.labels(_known(method), code, reason).inc()
        self._seconds.labels(_known(method)).observe(seconds)

    def watch(self, events: Iterator[Any]) -> Iterator[Any]:
        """The events of a prediction, unchanged, whose chunks come as bytes and whose trailer has the seconds."""
        start, is_sending = time.monotonic(), False
        try:
            for event in events:
                if isinstance(event, bytes):
                    if not is_sending:
                        is_sending = True
                        self._streams.inc()
                        self._first_chunk.observe(time.monotonic() - start)
                    self._bytes.inc(len(event))
                elif event.HasField("trailer"):
                    for stage, seconds in event.trailer.seconds.items():
                        self._stages.labels(stage).observe(seconds)
                yield event
        finally:
            self._streams.dec(is_sending)

    def listen(self, host: str, port: int) -> None:
        """Serves the metrics over HTTP.

        Raises:
            ConfigurationError: The port is taken, or the host is not ours.
        """
        with usable(f"cannot serve metrics on port {port} of {host!r}"):
            server, thread = start_http_server(port, host, self.registry)
        server.RequestHandlerClass.timeout = HTTP_IDLE_S  # type: ignore[attr-defined]
        self.address = f"{host}:{server.server_port}"

        def close() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        self._close = close

    def close(self) -> None:
        """Serves no longer."""
        self._close()


def _known(method: str) -> str:
    """The name of a method; one for all that clients may think of, so that they cannot make up series."""
    return method if method in METHODS else OTHER_METHOD


class ServerState(Collector):
    """What the parts of a server know, asked when somebody looks.

    Args:
        queue: Predictions that wait.
        silent_s: Seconds without a sign of life after which a worker counts as dead.
        gate: Places for calls.
        memory: The budget.
        replies: Those that are shared and kept.
        models: The hypernetworks.
    """

    def __init__(
        self,
        queue: WorkQueue,
        silent_s: float,
        gate: Gate,
        memory: Budget,
        replies: SharedReplies,
        models: ModelRegistry,
    ) -> None:
        self.queue, self.silent_s, self.gate = queue, silent_s, gate
        self.memory, self.replies, self.models = memory, replies, models

    def collect(self) -> Iterable[Metric]:
        """The present values."""
        values = {
            "ghn_queue_depth": ("Predictions that wait for a device", self.queue.num_waiting),
            "ghn_queue_places": ("Predictions that may wait", self.queue.max_queue),
            "ghn_workers": ("Devices that predict", len(self.models.devices)),
            "ghn_workers_alive": ("Those that gave a sign of life", self.queue.num_alive(self.silent_s)),
            "ghn_memory_bytes": ("Budget of memory for requests", self.memory.total),
            "ghn_memory_used_bytes": ("What is held of it", self.memory.used),
            "ghn_cache_bytes": ("What kept replies hold of it", self.replies.kept_bytes),
        }
        for name, (text, value) in values.items():
            yield GaugeMetricFamily(name, text, value)
        yield CounterMetricFamily("ghn_cache_hits", "Requests answered by a kept reply", self.replies.num_hits)
        yield CounterMetricFamily("ghn_cache_shared", "Requests that shared a prediction", self.replies.num_followed)
        yield CounterMetricFamily("ghn_cache_misses", "Requests that were predicted", self.replies.num_misses)
        places = GaugeMetricFamily("ghn_call_places", "Calls of a kind that may run at once", labels=("kind",))
        taken = GaugeMetricFamily("ghn_call_places_taken", "Calls of a kind that run", labels=("kind",))
        for kind, budget in self.gate.places.items():
            places.add_metric((kind,), budget.total)
            taken.add_metric((kind,), budget.used)
        models = GaugeMetricFamily(
            "ghn_model_info", "A hypernetwork that is loaded", labels=("model", "kind", "digest")
        )
        for model in self.models.loaded():
            models.add_metric((model.name, model.summary.kind, model.summary.digest), 1)
        build = GaugeMetricFamily("ghn_build_info", "Versions", labels=("version", "torch"))
        build.add_metric((VERSION, torch.__version__), 1)
        yield from (places, taken, models, build)


def tracing_interceptor() -> grpc.ServerInterceptor:
    """A span for every call but health, sent where the ``OTEL_*`` variables say.

    Raises:
        ConfigurationError: The extra is not installed.
    """
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.instrumentation.grpc import filters, server_interceptor
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"--tracing needs {error.name}: pip install '.[tracing]' in the project's folder"
        ) from error
    provider = trace.get_tracer_provider()
    if not isinstance(provider, TracerProvider):  # else the program that embeds the server has chosen one
        provider = TracerProvider(resource=Resource.create({"service.name": "ghn-server", "service.version": VERSION}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    make: Callable[..., grpc.ServerInterceptor] = server_interceptor
    return make(provider, filters.negate(filters.health_check()))
