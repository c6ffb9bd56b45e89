"""The outermost layer of every call: its identifier, its line in the log, and the gRPC status of an error.

This is the only place that catches every exception. Nothing of a stack trace or of the server's files reaches a
client: an error of ours has a row in ``STATUSES``, and of any other the client learns where to look for it. Clients
tell causes apart by code and ``ErrorInfo.reason``; ``docs/server.md`` lists both.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import structlog
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health

from ghn_client.wire.codec import serialize_event
from ghn_service import errors
from ghn_service.errors import (
    GhnServiceError,
    InvalidOptionError,
    OverloadedError,
    RequestCancelledError,
    UnauthenticatedError,
    memory_errors,
)
from ghn_service.server.access import TOKEN_NAME, Tokens, peer_identity
from ghn_service.server.admission import SIDE_KINDS, WATCH, Gate, Kind
from ghn_service.server.metrics import Metrics

logger = logging.getLogger(__name__)

MAX_REQUEST_ID_CHARACTERS = 128
MAX_TEXT_BYTES = 800
"""Of a message and of a field's name: the status has the message as text, where a byte may become three, and twice more
in its details, where three bytes become four."""
DOMAIN = "ghn.v1"
STATUS_DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"
RETRY_AFTER_MS = 1000


# ---- what an error becomes ------------------------------------------------------------------------------------------


class RpcStatus(grpc.Status):
    """How a call ends."""

    def __init__(
        self, code: grpc.StatusCode, details: str, trailing_metadata: tuple[tuple[str, str | bytes], ...]
    ) -> None:
        self.code = code
        self.details = details
        self.trailing_metadata = trailing_metadata


@dataclass(frozen=True, slots=True)
class StatusRow:
    """What a class of errors becomes.

    Attributes:
        code: The status.
        reason: ``ErrorInfo.reason``.
        detail: Makes the further detail of a field and a text; None for none.
        retry: Whether the same request may succeed later.
        is_told: Whether the client reads the message; else it reads the request's identifier only.
    """

    code: grpc.StatusCode
    reason: str
    detail: Callable[[str, str], Message] | None = None
    retry: bool = False
    is_told: bool = True


def _bad_request(field: str, text: str) -> Message:
    violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=text)
    detail: Message = error_details_pb2.BadRequest(field_violations=[violation])
    return detail


def _quota(field: str, text: str) -> Message:
    violation = error_details_pb2.QuotaFailure.Violation(subject=field, description=text)
    detail: Message = error_details_pb2.QuotaFailure(violations=[violation])
    return detail


def _model(field: str, text: str) -> Message:
    detail: Message = error_details_pb2.ResourceInfo(resource_type="ghn.v1.Model", description=text)
    return detail


_CODE = grpc.StatusCode
STATUSES: dict[type[GhnServiceError], StatusRow] = {
    errors.InvalidArchitectureError: StatusRow(_CODE.INVALID_ARGUMENT, "INVALID_ARCHITECTURE", _bad_request),
    errors.InvalidOptionError: StatusRow(_CODE.INVALID_ARGUMENT, "INVALID_OPTION", _bad_request),
    errors.UnsupportedArchitectureError: StatusRow(_CODE.UNIMPLEMENTED, "UNSUPPORTED_ARCHITECTURE", _bad_request),
    errors.UnsupportedOptionError: StatusRow(_CODE.UNIMPLEMENTED, "UNSUPPORTED_OPTION", _bad_request),
    errors.LimitExceededError: StatusRow(_CODE.RESOURCE_EXHAUSTED, "LIMIT_EXCEEDED", _quota),
    errors.UnauthenticatedError: StatusRow(_CODE.UNAUTHENTICATED, "UNAUTHENTICATED"),
    errors.OverloadedError: StatusRow(_CODE.RESOURCE_EXHAUSTED, "OVERLOADED", retry=True),
    errors.OutOfMemoryError: StatusRow(_CODE.RESOURCE_EXHAUSTED, "OUT_OF_MEMORY", retry=True),
    errors.UnknownModelError: StatusRow(_CODE.NOT_FOUND, "UNKNOWN_MODEL", _model),
    errors.SourceError: StatusRow(_CODE.FAILED_PRECONDITION, "SOURCE_UNUSABLE", _bad_request),
    errors.CheckpointError: StatusRow(_CODE.FAILED_PRECONDITION, "CHECKPOINT_BROKEN", _model),
    errors.UnavailableError: StatusRow(_CODE.UNAVAILABLE, "UNAVAILABLE", retry=True),
    errors.DeadlineExceededError: StatusRow(_CODE.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
    errors.RequestCancelledError: StatusRow(_CODE.CANCELLED, "CANCELLED"),
    errors.PredictionError: StatusRow(_CODE.INTERNAL, "PREDICTION_FAILED"),
    errors.DeviceLostError: StatusRow(_CODE.INTERNAL, "DEVICE_LOST"),
    errors.GhnServiceError: StatusRow(_CODE.INTERNAL, "INTERNAL", is_told=False),
}
"""Status by class of error; a class without a row has that of its nearest base, and a stranger the last one."""


def status_row(error: BaseException) -> StatusRow:
    """The row of an error."""
    return next((STATUSES[base] for base in type(error).__mro__ if base in STATUSES), STATUSES[GhnServiceError])


def encode_status(error: BaseException, *, request_id: str) -> RpcStatus:
    """The status that an error becomes; under 6 KB on the wire, and without anything of the server's inside.

    Args:
        error: Any exception.
        request_id: Identifier of the request in the logs.
    """
    row = status_row(error)
    text = str(error) if row.is_told else f"internal error; the server's log has it under {request_id!r}"
    text = _shorten(text)
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=row.reason, domain=DOMAIN, metadata={"request_id": request_id})
    ]
    metadata: tuple[tuple[str, str | bytes], ...] = ()
    if row.detail is not None:
        details.append(row.detail(_shorten(getattr(error, "field", "")), text))
    if row.retry:
        delay = Duration()
        delay.FromMilliseconds(RETRY_AFTER_MS)
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
        metadata = ((PUSHBACK_KEY, str(RETRY_AFTER_MS)),)
    status = status_pb2.Status(code=row.code.value[0], message=text)
    for detail in details:
        status.details.add().Pack(detail)
    return RpcStatus(row.code, text, (*metadata, (STATUS_DETAILS_KEY, status.SerializeToString())))


def _shorten(text: str) -> str:
    """What fits into the trailers of a call, which are small."""
    data = text.encode(errors="replace")
    if len(data) <= MAX_TEXT_BYTES:
        return data.decode()
    return data[: MAX_TEXT_BYTES - 3].decode(errors="ignore") + "…"


# ---- what every call passes through ---------------------------------------------------------------------------------


class CallInterceptor(grpc.ServerInterceptor):
    """Wraps every method: asks for a token, but for health; gives the call a name, a place and a line in the log.

    Every method becomes one of streams, whatever it was: only then is its thread ours before its request is there.

    Args:
        gate: Where places are.
        metrics: Where calls are counted.
        tokens: Who may call; None for everyone.
    """

    def __init__(self, gate: Gate, metrics: Metrics, tokens: Tokens | None = None) -> None:
        self._gate = gate
        self._metrics = metrics
        self._tokens = tokens

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """The wrapped handler of a call; the events of a stream may come as bytes, serialised already."""
        kind = self._gate.kind_of(handler_call_details.method)
        method = handler_call_details.method.rpartition("/")[2]
        if self._tokens is not None and not handler_call_details.method.startswith(f"/{health.SERVICE_NAME}/"):
            try:
                TOKEN_NAME.set(self._tokens.admit(handler_call_details.invocation_metadata))
            except UnauthenticatedError as error:
                return _refuse(error, method, kind, self._metrics)
        handler = continuation(handler_call_details)
        if handler is None:
            self._metrics.count(method, "UNIMPLEMENTED")
            return None
        parse, serialize = handler.request_deserializer, handler.response_serializer
        if handler.unary_stream is not None and kind not in SIDE_KINDS:
            serialize = serialize_event
        assert parse is not None, "all methods take protobuf messages"

        def parse_or_mark(message: bytes) -> Any:
            try:
                return parse(message)
            except DecodeError:
                return _MALFORMED  # refused inside the guard, with a proper status

        def guarded(messages: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
            with _guard(context, method, kind, self._metrics) as name_call, self._gate.enter(kind, context):
                if handler.stream_stream is not None:
                    yield from handler.stream_stream(messages, context)
                    return
                request = self._gate.receive(kind, messages, context)
                if request is _MALFORMED:
                    raise InvalidOptionError("the request is no message of this method")
                name_call(request)
                if handler.unary_stream is not None:
                    events = handler.unary_stream(request, context)
                    yield from events if kind in SIDE_KINDS else self._metrics.watch(events)
                elif handler.unary_unary is not None:
                    yield handler.unary_unary(request, context)

        return grpc.stream_stream_rpc_method_handler(guarded, parse_or_mark, serialize)


def _refuse(error: GhnServiceError, method: str, kind: Kind, metrics: Metrics) -> grpc.RpcMethodHandler[Any, Any]:
    """A handler that ends a call of any method without reading its request."""

    def refused(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
        with _guard(context, method, kind, metrics):
            raise error

    return grpc.stream_stream_rpc_method_handler(refused)


_MALFORMED = object()
"""Stands for a request that is no protobuf message."""


@contextmanager
def _guard(context: grpc.ServicerContext, method: str, kind: Kind, metrics: Metrics) -> Iterator[Callable[[Any], None]]:
    """Names the call, and ends it with the status of what the body raises.

    Gives a function that takes the name from the request once it is there; the handler finds the name in it.
    """
    start = time.perf_counter()
    request_id = uuid.uuid4().hex
    error: Exception | None = None

    def name_call(request: Any) -> None:
        nonlocal request_id
        given = getattr(request, "request_id", None)
        if given is None:
            return
        if not (len(given) <= MAX_REQUEST_ID_CHARACTERS and given.isascii() and given.isprintable()):
            raise InvalidOptionError(
                f"expected at most {MAX_REQUEST_ID_CHARACTERS} printable ASCII characters, got {len(given)}",
                field="request_id",
            )
        request.request_id = request_id = given or request_id
        structlog.contextvars.bind_contextvars(request_id=request_id)

    def end(code: str, error: BaseException | None = None, reason: str = "") -> None:
        seconds = time.perf_counter() - start
        metrics.count(method, code, status_row(error).reason if error else reason, seconds=seconds)
        _log(logging.DEBUG if kind in SIDE_KINDS else logging.INFO, code, seconds, error)

    names = {"request_id": request_id, "method": method, "peer": peer_identity(context)}
    with metrics.running(method), structlog.contextvars.bound_contextvars(**names):
        try:
            with memory_errors("the server has not enough free memory for this request; try again later"):
                yield name_call
        except GeneratorExit:
            end("CANCELLED", reason="CANCELLED")
            raise
        except grpc.RpcError:  # what waiting for a message of a client ends with that has gone
            error = RequestCancelledError("the client went away")
        except Exception as raised:
            error = raised
        if error is None and not context.is_active():
            error = RequestCancelledError("the client went away")
        if error is None:
            ended_as: grpc.StatusCode | None = context.code()  # type: ignore[attr-defined]  # the stubs are older
            end((ended_as or grpc.StatusCode.OK).name)
            return
        status = encode_status(error, request_id=request_id)
        if kind is WATCH and isinstance(error, OverloadedError):
            status = RpcStatus(grpc.StatusCode.UNIMPLEMENTED, status.details, ())
        end(status.code.name, error)
        context.set_code(status.code)  # for those who watch the context, such as traces
        error = None  # its traceback leads here and to the request, which would wait for the collector of cycles
    context.abort_with_status(status)


def _log(level: int, code: str, seconds: float, error: BaseException | None) -> None:
    extra = {"code": code, "seconds": round(seconds, 4)}
    if error is None:
        logger.log(level, "call", extra=extra)
    elif status_row(error).is_told:
        logger.log(level, "call: %s", error, extra=extra)
    else:
        logger.error("call failed: %r", error, extra=extra, exc_info=error)
