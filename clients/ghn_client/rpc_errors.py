"""gRPC statuses as the client's exceptions: the one place where codes, reasons and details are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from ghn_client.errors import (
    AuthenticationError,
    DeadlineExceededError,
    GhnClientError,
    InvalidArchitectureError,
    InvalidOptionError,
    LimitExceededError,
    OverloadedError,
    ServerError,
    ServerUnavailableError,
    StreamCorruptedError,
    TemporaryError,
    UnknownModelError,
    UnsupportedArchitectureError,
    UnsupportedOptionError,
)

_PUSHBACK_KEY = "grpc-retry-pushback-ms"
_CODE = grpc.StatusCode

_BY_REASON: Mapping[str, type[GhnClientError]] = {
    "INVALID_ARCHITECTURE": InvalidArchitectureError,
    "INVALID_OPTION": InvalidOptionError,
    "UNSUPPORTED_ARCHITECTURE": UnsupportedArchitectureError,
    "UNSUPPORTED_OPTION": UnsupportedOptionError,
    "LIMIT_EXCEEDED": LimitExceededError,
    "OVERLOADED": OverloadedError,
    "OUT_OF_MEMORY": OverloadedError,
    "UNKNOWN_MODEL": UnknownModelError,
}
_BY_CODE: Mapping[grpc.StatusCode, type[GhnClientError]] = {
    _CODE.INVALID_ARGUMENT: InvalidOptionError,
    _CODE.OUT_OF_RANGE: InvalidOptionError,
    _CODE.UNIMPLEMENTED: UnsupportedOptionError,
    _CODE.RESOURCE_EXHAUSTED: LimitExceededError,
    _CODE.NOT_FOUND: UnknownModelError,
    _CODE.UNAVAILABLE: ServerUnavailableError,
    _CODE.DEADLINE_EXCEEDED: DeadlineExceededError,
    _CODE.UNAUTHENTICATED: AuthenticationError,
    _CODE.PERMISSION_DENIED: AuthenticationError,
    _CODE.DATA_LOSS: StreamCorruptedError,
}


@dataclass(frozen=True, slots=True)
class StatusDetails:
    """What a status says beyond its code.

    Attributes:
        reason: ``ErrorInfo.reason``, "" without one.
        request_id: Identifier in the server's logs, "" without one.
        field: Dotted path of the field at fault, "" without one.
        retry_after_s: Seconds after which to try again; None if it does not say; negative if it says never.
    """

    reason: str = ""
    request_id: str = ""
    field: str = ""
    retry_after_s: float | None = None


def error_from_rpc(error: grpc.RpcError, *, address: str) -> GhnClientError:
    """The exception of ours that a failed call becomes.

    Args:
        error: What gRPC raised.
        address: Where the call went, for the message.
    """
    call = cast("grpc.Call", error)  # what a channel raises is both
    code, details = call.code(), decode_details(call)
    kind = _BY_REASON.get(details.reason) or _BY_CODE.get(code, ServerError)
    text = _TEXTS.get(kind, _plain)(call.details() or "", address)
    if issubclass(kind, TemporaryError):
        return kind(text, field=details.field, request_id=details.request_id, retry_after_s=details.retry_after_s)
    return kind(text, field=details.field, request_id=details.request_id)


def decode_details(call: grpc.Call) -> StatusDetails:
    """Reads the google.rpc details and the retry pushback of a failed call."""
    values: dict[str, str] = {}
    retry_after_s = _pushback_s(call)
    try:
        status = rpc_status.from_call(call)
    except ValueError:  # the details contradict the status: a proxy has changed one of them
        status = None
    for packed in status.details if status is not None else ():
        info, request, retry = (
            error_details_pb2.ErrorInfo(),
            error_details_pb2.BadRequest(),
            error_details_pb2.RetryInfo(),
        )
        if packed.Unpack(info):
            values["reason"] = info.reason
            values["request_id"] = info.metadata.get("request_id", "")
        elif packed.Unpack(request) and request.field_violations:
            values["field"] = request.field_violations[0].field
        elif packed.Unpack(retry) and retry_after_s is None:
            retry_after_s = retry.retry_delay.ToTimedelta().total_seconds()
    return StatusDetails(**values, retry_after_s=retry_after_s)


def _pushback_s(call: grpc.Call) -> float | None:
    for key, value in call.trailing_metadata() or ():
        if key == _PUSHBACK_KEY and isinstance(value, str):
            try:
                return int(value) / 1000
            except ValueError:
                return -1.0  # malformed means "do not retry" (gRFC A6)
    return None


def _plain(text: str, address: str) -> str:
    return text or f"the server at {address} gave no reason"


def _unavailable(text: str, address: str) -> str:
    return f"no server answers at {address} ({text or 'connection lost'}); check the address, and TLS on both sides"


def _too_late(text: str, address: str) -> str:
    return f"the server at {address} did not finish in time ({text or 'deadline exceeded'}); raise timeout_s"


_TEXTS: Mapping[type[GhnClientError], Callable[[str, str], str]] = {
    ServerUnavailableError: _unavailable,
    DeadlineExceededError: _too_late,
}
