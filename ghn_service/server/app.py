"""Builds a server from settings, runs it, and stops it without dropping what is on its way."""

from __future__ import annotations

import logging
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import FrameType

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ghn_client.wire import ghn_pb2_grpc
from ghn_client.wire.codec import SERVICE
from ghn_service.errors import ConfigurationError, GhnServiceError, UnavailableError
from ghn_service.server.access import exposure_warning, load_access
from ghn_service.server.admission import SIDE_KINDS, Budget, Gate, Kind, default_memory_bytes
from ghn_service.server.calls import CallInterceptor
from ghn_service.server.metrics import Metrics, ServerState, tracing_interceptor
from ghn_service.server.models import LoadPredictor, ModelRegistry, load_predictor, resolve_devices
from ghn_service.server.queue import WorkQueue
from ghn_service.server.service import GhnService
from ghn_service.server.settings import Settings, checkpoint_files, source_folders
from ghn_service.server.sharing import SharedReplies
from ghn_service.server.watchdog import Watchdog
from ghn_service.transfer.library import Library

logger = logging.getLogger(__name__)

SPARE_THREADS = 32
"""Threads beyond the places of all kinds of calls: for saying no."""
MESSAGE_OVERHEAD_BYTES = 64 * 1024
WORKER_JOIN_S = 10.0
READY_POLL_S = 0.2
QUIET_S = 3.0
"""A stop that waits this long for calls that nobody serves waits for some that gRPC took and never handed over."""

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class RunningServer:
    """A server that listens; a context manager that stops it.

    Args:
        settings: Everything that can be chosen.
        load: Reads one checkpoint onto one device; None for ``load_predictor`` with the settings' element type.

    Attributes:
        address: Where it listens, as ``host:port``; a host that clients can dial even if it listens on all.
        health_address: The same of the port for health alone; "" for none.
        sources: Trained networks that weights are taken from.
        gate: Places for calls.
        memory: The budget that requests hold memory of.
        replies: Predictions that are shared.
        work_queue: Predictions that wait, and the workers.
        metrics: What is counted.

    Raises:
        ConfigurationError: There is no checkpoint, a port is taken, or a file of TLS or tokens is unusable.
        InvalidOptionError: There is no such device.
    """

    def __init__(self, settings: Settings, *, load: LoadPredictor | None = None) -> None:
        devices = resolve_devices(settings.device)
        files = checkpoint_files(settings)
        access = load_access(settings)
        self.sources = Library(source_folders(settings))
        self.settings = settings
        self._is_ready = self._stopped = False
        self._watchdog = Watchdog(settings.send_idle_seconds, settings.min_bytes_per_second, self._look_at_workers)
        kind = Kind("prediction", settings.max_calls, settings.send_idle_seconds, is_bounded=False)
        self.gate = Gate((kind, *SIDE_KINDS), settings.max_peer_share, self._watchdog)
        num_threads = self.gate.num_places + SPARE_THREADS
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="ghn-call")
        self.metrics = Metrics()
        interceptors: list[grpc.ServerInterceptor] = [CallInterceptor(self.gate, self.metrics, access.tokens)]
        if settings.tracing:
            interceptors.insert(0, tracing_interceptor())
        self._server = _build_grpc_server(settings, self._pool, num_threads, interceptors)
        self._health = health.HealthServicer()
        port = _bind(self._server, settings.host, settings.port, access.credentials)
        self.address = f"{_dialable(settings.host)}:{port}"
        self._health_server, self.health_address = _build_health_server(
            settings, self._health, self._watchdog, self.metrics
        )
        if settings.metrics_port is not None:
            self.metrics.listen(settings.metrics_host, settings.metrics_port)
        self.work_queue = WorkQueue(num_workers=len(devices), max_queue=settings.max_queue)
        memory_bytes = default_memory_bytes(0) if settings.memory_bytes is None else settings.memory_bytes
        self.memory = Budget("bytes of memory", memory_bytes, settings.max_peer_share)
        cache_bytes = memory_bytes // 10 if settings.cache_bytes is None else settings.cache_bytes
        self.replies = SharedReplies(self.work_queue, self.memory, min(cache_bytes, memory_bytes))
        load_as_set = partial(load_predictor, compute_dtype=settings.compute_dtype)
        self._models = ModelRegistry(files, devices, load=load or load_as_set, on_done=self._become_ready)
        state = ServerState(
            self.work_queue, settings.worker_seconds, self.gate, self.memory, self.replies, self._models
        )
        self.metrics.registry.register(state)
        self._register(settings)
        self._server.start()
        if self._health_server is not None:
            self._health_server.start()
        if warning := exposure_warning(settings):
            logger.warning("%s", warning)
        self._watchdog.start()
        self._models.start()

    def __enter__(self) -> RunningServer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop(grace_s=0.0)

    def wait_ready(self, timeout_s: float | None = None) -> None:
        """Waits until every checkpoint is loaded.

        Raises:
            CheckpointError: One cannot be loaded.
            UnavailableError: It takes longer than this.
        """
        self._models.wait(timeout_s)

    def stop(self, grace_s: float | None = None, *, drain_s: float = 0.0) -> None:
        """Stops: says "not serving", waits, refuses calls, lets running ones finish, ends the threads.

        Args:
            grace_s: Seconds that running calls get; None for those of the settings.
            drain_s: Seconds between saying "not serving" and refusing calls, so that load balancers notice first.
        """
        if self._stopped:
            return
        self._stopped = True
        self._health.enter_graceful_shutdown()
        time.sleep(drain_s)
        stopped = self._server.stop(self.settings.grace_seconds if grace_s is None else grace_s)
        self.gate.close()
        quiet_since = time.monotonic()
        while not stopped.wait(READY_POLL_S):
            if not self.gate.is_empty:
                quiet_since = time.monotonic()
            elif time.monotonic() - quiet_since > QUIET_S:
                self.hurry()
        if self._health_server is not None:
            self._health_server.stop(None)
        self._watchdog.close()
        self.metrics.close()
        if not self.work_queue.close(WORKER_JOIN_S):
            logger.warning("a worker did not end within %g seconds", WORKER_JOIN_S)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def hurry(self) -> None:
        """Ends the grace of a ``stop`` that is on its way."""
        self._server.stop(0.0)

    def _register(self, settings: Settings) -> None:
        service = GhnService(
            settings, self._models, self.sources, self.work_queue, self.memory, self.replies, self._watchdog
        )
        ghn_pb2_grpc.add_GhnServiceServicer_to_server(service, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._health.set("", _SERVING)
        self._health.set(SERVICE, _NOT_SERVING)
        if settings.reflection:
            names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)

    def _become_ready(self) -> None:
        """The hypernetworks are in memory now, so their share of it is known."""
        if self.settings.memory_bytes is None:
            copies = self._models.devices.count("cpu")
            self.memory.total = default_memory_bytes(
                sum(copies * model.summary.num_bytes for model in self._models.loaded())
            )
        self._look_at_workers()

    def _look_at_workers(self) -> None:
        """Ready is a server with a hypernetwork and a worker that lives."""
        num_alive = self.work_queue.num_alive(self.settings.worker_seconds)
        is_ready = self._models.is_ready and num_alive > 0
        if is_ready != self._is_ready:
            self._is_ready = is_ready
            self._health.set(SERVICE, _SERVING if is_ready else _NOT_SERVING)
            if not is_ready:
                logger.error("no worker gave a sign of life for %g seconds; not ready", self.settings.worker_seconds)


def start_server(settings: Settings, *, load: LoadPredictor | None = None) -> RunningServer:
    """Starts a server; it listens at once, and loads its hypernetworks in the background."""
    return RunningServer(settings, load=load)


def serve(settings: Settings) -> None:
    """Runs a server until SIGTERM, SIGINT or SIGHUP, then stops it gracefully; a second signal ends the grace.

    Raises:
        ConfigurationError: It cannot start.
        InvalidOptionError: There is no such device.
        CheckpointError: A checkpoint cannot be loaded, and ``exit_on_error`` is set.
        DeviceLostError: A device can only be used again by another process.
    """
    stop = threading.Event()
    server = start_server(settings)

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            threading.Thread(target=server.hurry, daemon=True).start()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, on_signal)
    logger.info("listening", extra={"address": server.address})
    try:
        if settings.exit_on_error:
            _wait_until_ready(server, stop)
        while not stop.wait(READY_POLL_S):
            if server.work_queue.lost is not None:
                raise server.work_queue.lost
    except GhnServiceError:
        server.stop(0.0)
        raise
    logger.info("stopping", extra={"grace_seconds": settings.grace_seconds})
    server.stop(drain_s=settings.drain_seconds)
    logger.info("stopped")


def _wait_until_ready(server: RunningServer, stop: threading.Event) -> None:
    """Waits for the checkpoints, or for the signal to stop."""
    while not stop.is_set():
        try:
            server.wait_ready(READY_POLL_S)
        except UnavailableError:
            continue
        logger.info("ready")
        return


def _build_health_server(
    settings: Settings, servicer: health.HealthServicer, watchdog: Watchdog, metrics: Metrics
) -> tuple[grpc.Server | None, str]:
    """A listener for probes that speak no TLS, and its address, if one is asked for."""
    if settings.health_port is None:
        return None, ""
    gate = Gate(SIDE_KINDS, settings.max_peer_share, watchdog)
    server = grpc.server(
        ThreadPoolExecutor(gate.num_places + SPARE_THREADS, "ghn-health"),
        interceptors=[CallInterceptor(gate, metrics)],
        options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", MESSAGE_OVERHEAD_BYTES)],
        maximum_concurrent_rpcs=gate.num_places + SPARE_THREADS,
    )
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    return server, f"{_dialable(settings.host)}:{_bind(server, settings.host, settings.health_port, None)}"


def _build_grpc_server(
    settings: Settings, pool: ThreadPoolExecutor, num_threads: int, interceptors: list[grpc.ServerInterceptor]
) -> grpc.Server:
    options = [
        ("grpc.so_reuseport", 0),  # else a second server would share the port in silence
        ("grpc.max_receive_message_length", settings.max_request_bytes + MESSAGE_OVERHEAD_BYTES),
        ("grpc.max_send_message_length", -1),
        ("grpc.http2.bdp_probe", 0),  # else gRPC takes megabytes of every call before anybody wants to receive it
        ("grpc.http2.lookahead_bytes", MESSAGE_OVERHEAD_BYTES),
        ("grpc.compression_enabled_algorithms_bitset", 1),  # none: else 60 KB of a client hold 60 MB here
        *_keepalive_options(settings),
    ]
    return grpc.server(pool, interceptors=interceptors, options=options, maximum_concurrent_rpcs=num_threads)


def _keepalive_options(settings: Settings) -> list[tuple[str, int]]:
    """How dead connections are found, and how long live ones last.

    A client of a queued request hears nothing for a while, so both sides may ask as often as they like without data.
    """
    options = [
        ("grpc.keepalive_time_ms", _milliseconds(settings.keepalive_seconds)),
        ("grpc.keepalive_timeout_ms", _milliseconds(settings.keepalive_timeout_seconds)),
        ("grpc.http2.ping_timeout_ms", _milliseconds(settings.keepalive_timeout_seconds)),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", _milliseconds(settings.min_ping_seconds)),
    ]
    if settings.max_connection_seconds:
        grace_s = settings.max_seconds + settings.send_idle_seconds  # more than any call takes
        options += [
            ("grpc.max_connection_age_ms", _milliseconds(settings.max_connection_seconds)),
            ("grpc.max_connection_age_grace_ms", _milliseconds(grace_s)),
        ]
    return options


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def _bind(server: grpc.Server, host: str, wanted: int, credentials: grpc.ServerCredentials | None) -> int:
    address = f"{host}:{wanted}"
    try:
        if credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise ConfigurationError(f"cannot listen on {address}: the port is taken or the host is not ours") from error
    if port == 0:
        raise ConfigurationError(f"cannot listen on {address}: the host is not ours")
    return port


def _dialable(host: str) -> str:
    """A host that a client on this machine can dial."""
    return {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)
