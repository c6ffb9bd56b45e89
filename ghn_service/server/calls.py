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

from ghn_client.wire.codec import SERVICE, serialize_event
from ghn_service import errors
from ghn_service.errors import GhnServiceError, InvalidOptionError, UnauthenticatedError, memory_errors
from ghn_service.server.access import TOKEN_NAME, Tokens, peer_identity

logger = logging.getLogger(__name__)

MAX_REQUEST_ID_CHARACTERS = 128
MAX_TEXT_CHARACTERS = 800
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
    errors.GhnServiceError: StatusRow(_CODE.INTERNAL, "INTERNAL", is_told=False),
}
"""Status by class of error; a class without a row has that of its nearest base, and a stranger the last one."""


def status_row(error: BaseException) -> StatusRow:
    """The row of an error."""
    return next((STATUSES[base] for base in type(error).__mro__ if base in STATUSES), STATUSES[GhnServiceError])


def encode_status(error: BaseException, *, request_id: str) -> RpcStatus:
    """The status that an error becomes; under 8 KB, and without anything of the server's inside.

    Args:
        error: Any exception.
        request_id: Identifier of the request in the logs.
    """
    row = status_row(error)
    text = str(error) if row.is_told else f"internal error; the server's log has it under {request_id!r}"
    if len(text) > MAX_TEXT_CHARACTERS:  # the trailers of a call are small
        text = text[: MAX_TEXT_CHARACTERS - 1] + "…"
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=row.reason, domain=DOMAIN, metadata={"request_id": request_id})
    ]
    metadata: tuple[tuple[str, str | bytes], ...] = ()
    if row.detail is not None:
        details.append(row.detail(getattr(error, "field", ""), text))
    if row.retry:
        delay = Duration()
        delay.FromMilliseconds(RETRY_AFTER_MS)
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
        metadata = ((PUSHBACK_KEY, str(RETRY_AFTER_MS)),)
    status = status_pb2.Status(code=row.code.value[0], message=text)
    for detail in details:
        status.details.add().Pack(detail)
    return RpcStatus(row.code, text, (*metadata, (STATUS_DETAILS_KEY, status.SerializeToString())))


# ---- what every call passes through ---------------------------------------------------------------------------------


class CallInterceptor(grpc.ServerInterceptor):
    """Asks for a token, but for health, and wraps every method of our service.

    Args:
        tokens: Who may call; None for everyone.
    """

    def __init__(self, tokens: Tokens | None = None) -> None:
        self._tokens = tokens

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """The wrapped handler of a call; the events of a stream may come as bytes, serialised already."""
        method = handler_call_details.method.rpartition("/")[2]
        if self._tokens is not None and not handler_call_details.method.startswith(f"/{health.SERVICE_NAME}/"):
            try:
                TOKEN_NAME.set(self._tokens.admit(handler_call_details.invocation_metadata))
            except UnauthenticatedError as error:
                return _refuse(error, method)
        handler = continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(f"/{SERVICE}/"):
            return handler
        parse, unary, stream = handler.request_deserializer, handler.unary_unary, handler.unary_stream
        assert parse is not None, "our methods take protobuf messages"

        def parse_or_mark(message: bytes) -> Any:
            try:
                return parse(message)
            except DecodeError:
                return _MALFORMED  # refused inside the guard, with a proper status

        def guarded_stream(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            assert stream is not None
            with _guard(request, context, method):
                yield from stream(request, context)

        def guarded_unary(request: Any, context: grpc.ServicerContext) -> Any:
            assert unary is not None
            with _guard(request, context, method):
                return unary(request, context)

        if stream is not None:
            return grpc.unary_stream_rpc_method_handler(guarded_stream, parse_or_mark, serialize_event)
        return grpc.unary_unary_rpc_method_handler(guarded_unary, parse_or_mark, handler.response_serializer)


def _refuse(error: GhnServiceError, method: str) -> grpc.RpcMethodHandler[Any, Any]:
    """A handler that ends a call of any method without reading its request."""

    def refused(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
        with _guard(None, context, method):
            raise error

    return grpc.stream_stream_rpc_method_handler(refused)


_MALFORMED = object()
"""Stands for a request that is no protobuf message."""


@contextmanager
def _guard(request: Any, context: grpc.ServicerContext, method: str) -> Iterator[None]:
    """Names the call, whose handler finds the name in the request; ends it with the status of what the body raises."""
    start = time.perf_counter()
    given = getattr(request, "request_id", "")
    is_usable = len(given) <= MAX_REQUEST_ID_CHARACTERS and given.isascii() and given.isprintable()
    request_id = given if given and is_usable else uuid.uuid4().hex
    error: Exception | None = None
    with structlog.contextvars.bound_contextvars(request_id=request_id, method=method, peer=peer_identity(context)):
        try:
            if request is _MALFORMED:
                raise InvalidOptionError("the request is no message of this method")
            if not is_usable:
                raise InvalidOptionError(
                    f"expected at most {MAX_REQUEST_ID_CHARACTERS} printable ASCII characters, got {len(given)}",
                    field="request_id",
                )
            if hasattr(request, "request_id"):
                request.request_id = request_id
            with memory_errors("the server has not enough free memory for this request; try again later"):
                yield
        except GeneratorExit:
            _log("CANCELLED", start, None)
            raise
        except Exception as raised:
            error = raised
        if error is None:
            _log("OK", start, None)
            return
        status = encode_status(error, request_id=request_id)
        _log(status.code.name, start, error)
    context.abort_with_status(status)


def _log(code: str, start: float, error: BaseException | None) -> None:
    extra = {"code": code, "seconds": round(time.perf_counter() - start, 4)}
    if error is None:
        logger.info("call", extra=extra)
    elif status_row(error).is_told:
        logger.info("call: %s", error, extra=extra)
    else:
        logger.error("call failed: %r", error, extra=extra, exc_info=error)
