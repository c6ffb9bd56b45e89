"""The outermost layer of every call: its identifier, its line in the log, and what an error becomes.

This is the only place that catches every exception. Nothing of a stack trace or of the server's files reaches a
client: an error of ours has a row in ``statuses.STATUSES``, and of any other the client learns where to look for it.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from ghn_client.wire.codec import SERVICE
from ghn_service.errors import InvalidOptionError, memory_errors
from ghn_service.server.logs import logged_as
from ghn_service.server.messages import decode_request_id
from ghn_service.server.statuses import encode_status, status_row

logger = logging.getLogger(__name__)

OUT_OF_MEMORY = "the server has not enough free memory for this request; try again later"

Continuation = Callable[[grpc.HandlerCallDetails], "grpc.RpcMethodHandler[Any, Any] | None"]


class CallInterceptor(grpc.ServerInterceptor):
    """Wraps every method of our service; health and reflection pass as they are."""

    def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Returns the wrapped handler of a call."""
        handler = continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(f"/{SERVICE}/"):
            return handler
        method = handler_call_details.method.rpartition("/")[2]
        parse = _tolerant(handler.request_deserializer)
        if handler.unary_stream is not None:
            stream = _guarded_stream(handler.unary_stream, method)
            return grpc.unary_stream_rpc_method_handler(stream, parse, handler.response_serializer)
        assert handler.unary_unary is not None, "our methods take one message"
        unary = _guarded_unary(handler.unary_unary, method)
        return grpc.unary_unary_rpc_method_handler(unary, parse, handler.response_serializer)


class _Malformed:
    """Stands for a request that is no protobuf message; refused inside the guard, with a proper status."""

    request_id = ""


def _tolerant(parse: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
    assert parse is not None, "our methods take protobuf messages"

    def parse_or_mark(message: bytes) -> Any:
        try:
            return parse(message)
        except DecodeError:
            return _Malformed()

    return parse_or_mark


def _guarded_unary(behavior: Callable[[Any, grpc.ServicerContext], Any], method: str) -> Callable[..., Any]:
    def call(request: Any, context: grpc.ServicerContext) -> Any:
        with _guard(request, context, method):
            return behavior(request, context)

    return call


def _guarded_stream(
    behavior: Callable[[Any, grpc.ServicerContext], Iterator[Any]], method: str
) -> Callable[..., Iterator[Any]]:
    def call(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        with _guard(request, context, method):
            yield from behavior(request, context)

    return call


@contextmanager
def _guard(request: Any, context: grpc.ServicerContext, method: str) -> Iterator[None]:
    """Names the call, and ends it with the status of whatever the body raises."""
    request_id, error = _identify(request)
    start = time.perf_counter()
    with logged_as(request_id, method):
        if error is None:
            try:
                with memory_errors(OUT_OF_MEMORY):
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


def _identify(request: Any) -> tuple[str, Exception | None]:
    """The identifier of a call, and why it is refused at once, if it is."""
    if isinstance(request, _Malformed):
        return uuid.uuid4().hex, InvalidOptionError("the request is no message of this method")
    try:
        return decode_request_id(getattr(request, "request_id", "")), None
    except InvalidOptionError as error:
        return uuid.uuid4().hex, error


def _log(code: str, start: float, error: BaseException | None) -> None:
    extra = {"code": code, "seconds": round(time.perf_counter() - start, 4)}
    if error is None:
        logger.info("call", extra=extra)
    elif status_row(error).is_told:
        logger.info("call: %s", error, extra=extra)
    else:
        logger.error("call failed: %r", error, extra=extra, exc_info=error)
