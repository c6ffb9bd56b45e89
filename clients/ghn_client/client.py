"""``GHNClient``: predicted weights for a network in three lines."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ghn_client.connection import MAX_ATTEMPTS, Connection
from ghn_client.embedded import lent_source, start_embedded_server
from ghn_client.errors import GhnClientError, InvalidOptionError, ServerUnavailableError, require_known
from ghn_client.info import (
    Analysis,
    Health,
    ModelInfo,
    ServerInfo,
    SourceInfo,
    decode_all,
    decode_analysis,
    decode_server_info,
    decode_source,
)
from ghn_client.onnx.export import Architecture, read_source
from ghn_client.options import LowRankLike, StepLike, encode_low_rank, encode_step
from ghn_client.prediction import Prediction
from ghn_client.sources import AUTO, SourceLike, as_source, example_of, is_in_library, read_local
from ghn_client.wire import ghn_pb2
from ghn_client.wire.codec import (
    SERVICE,
    Progress,
    encode_enum,
    enum_names,
    open_prediction_stream,
    receive_stream,
)
from ghn_client.wire.ghn_pb2_grpc import GhnServiceStub

DTYPES = enum_names(ghn_pb2.DataType)
HEADS = (AUTO, *enum_names(ghn_pb2.Head))
PREDICT_TIMEOUT_S = 300.0
SHORT_TIMEOUT_S = 30.0
MAX_BYTES = 1 << 36
"""Bytes of weights that are accepted from a server, unless more is asked for."""


class GHNClient:
    """A connection to a server; a context manager that forked processes may inherit.

    Threads may share it; exports of modules take turns, since torch traces one at a time.

    Example::

        with GHNClient("localhost:50051") as client:
            prediction = client.predict(module, torch.zeros(1, 3, 224, 224))
        prediction.load_into(module)

    Args:
        address: ``host:port``, or any gRPC target; of several servers (``dns:///ghn:50051``, ``ipv4:IP:PORT,IP:PORT``)
            those that are ready take calls in turn.
        token: Bearer token; sent over TLS or to this machine only.
        tls: Whether to encrypt; implied by any of the files below.
        root_certificates: PEM file of the authorities to trust, instead of the public ones that gRPC knows.
        client_certificate: PEM file of a certificate, for servers that ask clients for one.
        client_key: PEM file of its private key.
        server_name: Name in the server's certificate, where it is not the address (a tunnel, several servers).
        timeout_s: Seconds that a call may take, retries included; None for 300 for predictions and 30 for the rest.
        max_attempts: How often a call is tried while the server is away or busy.
        max_bytes: The largest prediction to accept; nothing is allocated before this check.

    Raises:
        InvalidOptionError: The address is empty.
        AuthenticationError: The token is none, or would travel in plain text.
    """

    def __init__(
        self,
        address: str,
        *,
        token: str | None = None,
        tls: bool = False,
        root_certificates: str | Path | None = None,
        client_certificate: str | Path | None = None,
        client_key: str | Path | None = None,
        server_name: str = "",
        timeout_s: float | None = None,
        max_attempts: int = MAX_ATTEMPTS,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        paths = [Path(item) if item else None for item in (root_certificates, client_certificate, client_key)]
        files = paths if tls or any(paths) else None
        self._connection = Connection(
            address, token=token, tls=files, server_name=server_name, max_attempts=max_attempts
        )
        self._timeout_s = timeout_s
        self._max_bytes = max_bytes
        self._server: Any = None

    @classmethod
    def embedded(cls, checkpoint: str | Path | None = None, *, timeout_s: float | None = None) -> GHNClient:
        """A client of a server inside this process, which stops when the client is closed.

        Args:
            checkpoint: A hypernetwork: a file, a name such as ``ghn3-t`` or ``hf://OWNER/REPO/FILE[@REVISION]``, which
                are fetched once; None for the one that comes with ghn-service.
            timeout_s: As for ``GHNClient``.

        Raises:
            EmbeddedServerError: ghn-service is not installed, or has no such checkpoint.
        """
        server = start_embedded_server(checkpoint)
        client = cls(server.address, timeout_s=timeout_s)
        client._server = server
        return client

    def __enter__(self) -> GHNClient:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def address(self) -> str:
        """Where the server is."""
        return self._connection.address

    @property
    def is_embedded(self) -> bool:
        """Whether the server is inside this process."""
        return self._server is not None

    def close(self) -> None:
        """Hangs up, and stops the embedded server if there is one."""
        self._connection.close()
        server, self._server = self._server, None
        if server is not None:
            self._connection.is_over = True
            server.stop(0.0)

    def predict(
        self,
        architecture: Architecture,
        example_inputs: Any = None,
        *,
        dtype: str | torch.dtype = "float32",
        seed: int = 0,
        steps: Sequence[StepLike] = (),
        low_rank: LowRankLike | None = None,
        model: str = "",
        include: str | Sequence[str] = (),
        report: bool = False,
        source: SourceLike | None = None,
        head: str = "auto",
        timeout_s: float | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Prediction:
        """Predicts weights for a network.

        Args:
            architecture: A torch module, the path of an ONNX file, or its bytes. Weights stay here; only structure is
                sent.
            example_inputs: What a module is called with; see ``export_architecture``.
            dtype: Element type of the reply: ``float32``, ``bfloat16`` or ``float16``, by name or as torch has it.
            seed: Seed of everything that is drawn, 0 to 2**64 - 1; the same seed gives the same bytes.
            steps: Post-processing in order: names, ``(name, options)`` pairs, or ``Step`` values.
            low_rank: Ask for factors instead of dense weights: ``LowRankOptions``, its fields as a mapping, or text.
            model: Name of one of ``models()``; "" for the server's default.
            include: Shell-style patterns on tensor names, or one such pattern; empty for all.
            source: A trained network to take weights from wherever they fit; the hypernetwork predicts the rest. A
                module, an ONNX file, a pair of either and its weights, ``timm:NAME``, a name in the server's library
                (see ``sources``), ``auto``, or a ``Source``. The weights of a network of this machine stay on it, so
                only a server inside this process takes one.
            report: Ask for the report of the page: the network's graph, and the diversity of each layer.
            head: What becomes of the classifier: ``predicted`` (rows are repeated or left out to fit another number of
                classes), ``reset`` (drawn anew), or ``auto``: reset where the number of classes is not the
                hypernetwork's.
            timeout_s: Seconds for all attempts together; None for the client's.
            on_progress: Called for every sign of life, on this thread.

        Raises:
            GhnClientError: One of its kinds per cause; see ``ghn_client.errors``.
        """
        if not 0 <= seed < 1 << 64:
            raise InvalidOptionError(f"expected a seed from 0 to 2**64 - 1, got {seed}", field="seed")
        fields = _common_fields(model, dtype, low_rank, head)
        target = read_source(architecture, example_inputs)
        request = ghn_pb2.PredictWeightsRequest(
            architecture=ghn_pb2.Architecture(onnx_model=target.structure),
            seed=seed,
            steps=[encode_step(step) for step in steps],
            include=[include] if isinstance(include, str) else list(include),
            report=report,
            **fields,
        )

        def attempt(channel: grpc.Channel, remaining_s: float) -> Prediction:
            events = open_prediction_stream(channel)(request, timeout=remaining_s, metadata=self._connection.metadata)
            try:
                buffer, trailer = receive_stream(events, max_bytes=self._max_bytes, on_progress=on_progress)
                return Prediction.from_buffer(buffer, trailer=trailer, source=target)
            except GhnClientError as error:
                error.request_id = error.request_id or request.request_id
                raise
            finally:
                events.cancel()

        with self._found_source(source, architecture, example_inputs) as options:
            request.MergeFrom(ghn_pb2.PredictWeightsRequest(source=options))
            timeout_s = timeout_s or self._timeout_s or PREDICT_TIMEOUT_S
            return self._connection.call(attempt, timeout_s=timeout_s)

    def analyze(
        self,
        architecture: Architecture,
        example_inputs: Any = None,
        *,
        dtype: str | torch.dtype = "float32",
        model: str = "",
        low_rank: LowRankLike | None = None,
        source: SourceLike | None = None,
        head: str = "auto",
        timeout_s: float | None = None,
    ) -> Analysis:
        """Says what ``predict`` would do with each tensor; arguments as there.

        Nothing is predicted, unless ``low_rank`` is given: then the answer tells what each layer would become, and
        what other ranks would cost and save.
        """
        fields = _common_fields(model, dtype, low_rank, head)
        structure = read_source(architecture, example_inputs).structure
        timeout_s = timeout_s or self._timeout_s or (PREDICT_TIMEOUT_S if low_rank or source else SHORT_TIMEOUT_S)
        with self._found_source(source, architecture, example_inputs) as options:
            request = ghn_pb2.AnalyzeArchitectureRequest(
                architecture=ghn_pb2.Architecture(onnx_model=structure), source=options, **fields
            )
            return decode_analysis(self._unary("AnalyzeArchitecture", request, timeout_s))

    def models(self, *, timeout_s: float | None = None) -> tuple[ModelInfo, ...]:
        """The hypernetworks that the server has loaded, the default one first."""
        return decode_all(ModelInfo, self._unary("ListModels", ghn_pb2.ListModelsRequest(), timeout_s).models)

    def sources(self, *, timeout_s: float | None = None) -> tuple[SourceInfo, ...]:
        """The trained networks of the server's library, by name."""
        found = self._unary("ListModels", ghn_pb2.ListModelsRequest(), timeout_s).sources
        return tuple(map(decode_source, found))

    def steps(self, *, timeout_s: float | None = None) -> tuple[str, ...]:
        """Names of the post-processing steps that the server knows."""
        return tuple(self._unary("ListModels", ghn_pb2.ListModelsRequest(), timeout_s).steps)

    def server_info(self, *, timeout_s: float | None = None) -> ServerInfo:
        """Version, devices and limits of the server."""
        return decode_server_info(self._unary("GetServerInfo", ghn_pb2.GetServerInfoRequest(), timeout_s))

    def health(self, *, timeout_s: float | None = None) -> Health:
        """Whether the server is there and can predict; asks once, and an absent server is no error."""
        serving = []
        for service in ("", SERVICE):
            request = health_pb2.HealthCheckRequest(service=service)
            try:
                reply = self._unary("Check", request, timeout_s, stub=health_pb2_grpc.HealthStub, max_attempts=1)
            except ServerUnavailableError:
                return Health(alive=False, ready=False)
            serving.append(reply.status == health_pb2.HealthCheckResponse.SERVING)
        return Health(*serving)

    @contextlib.contextmanager
    def _found_source(
        self, source: SourceLike | None, target: Architecture, example_inputs: Any
    ) -> Iterator[ghn_pb2.SourceOptions | None]:
        """What a request says of a source; a network of this machine is known to the server within the body."""
        if source is None:
            yield None
            return
        wanted = as_source(source)
        options = ghn_pb2.SourceOptions(
            class_layer=_encode_choice(ghn_pb2.ClassLayer, wanted.class_layer), post_process=wanted.post_process
        )
        if is_in_library(wanted):
            options.name = str(wanted.network)
            yield options
            return
        if self._server is None:
            raise InvalidOptionError(
                f"weights of a network of this machine are not sent to a server, and {self.address} is one: use the "
                "server inside this process (GHNClient.embedded(), no --address), or have its operator add the source "
                "(ghn-server add-source FILE --to DIR, ghn-server serve --sources DIR) and name it",
                field="source",
            )
        with lent_source(self._server, read_local(wanted, example_of(target, example_inputs))) as options.name:
            yield options

    def _unary(
        self,
        method: str,
        request: Any,
        timeout_s: float | None,
        *,
        stub: Callable[[grpc.Channel], Any] = GhnServiceStub,
        max_attempts: int | None = None,
    ) -> Any:
        def attempt(channel: grpc.Channel, remaining_s: float) -> Any:
            return getattr(stub(channel), method)(request, timeout=remaining_s, metadata=self._connection.metadata)

        seconds = timeout_s or self._timeout_s or SHORT_TIMEOUT_S
        return self._connection.call(attempt, timeout_s=seconds, max_attempts=max_attempts)


def _encode_choice(kind: Any, name: str) -> Any:
    return encode_enum(kind, "" if name == AUTO else name)


def _common_fields(model: str, dtype: str | torch.dtype, low_rank: LowRankLike | None, head: str) -> dict[str, Any]:
    """What requests for a prediction and for an analysis have in common, but for the architecture."""
    dtype = str(dtype).removeprefix("torch.")
    require_known(dtype, DTYPES, field="dtype")
    require_known(head, HEADS, field="head")
    return {
        "model": model,
        "dtype": encode_enum(ghn_pb2.DataType, dtype),
        "low_rank": None if low_rank is None else encode_low_rank(low_rank),
        "head": _encode_choice(ghn_pb2.Head, head),
        "request_id": uuid.uuid4().hex,
    }
