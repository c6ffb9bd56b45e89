"""Errors as gRPC statuses with ``google.rpc`` details: the one table, and how a row of it is written.

Clients tell causes apart by code and ``ErrorInfo.reason``; ``docs/protocol.md`` lists both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from ghn_service import errors
from ghn_service.errors import GhnServiceError

DOMAIN = "ghn.v1"
MAX_TEXT_CHARACTERS = 800
STATUS_DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"
RETRY_AFTER_S = 1.0


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
        detail: Makes the further detail of an error; None for none.
        retry: Whether the same request may succeed later.
        is_told: Whether the client reads the message; else it reads the request's identifier only.
    """

    code: grpc.StatusCode
    reason: str
    detail: Callable[[GhnServiceError], Message] | None = None
    retry: bool = False
    is_told: bool = True


def _bad_request(error: GhnServiceError) -> Message:
    violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=shorten(str(error)))
    detail: Message = error_details_pb2.BadRequest(field_violations=[violation])
    return detail


def _quota(error: GhnServiceError) -> Message:
    violation = error_details_pb2.QuotaFailure.Violation(subject=error.field, description=shorten(str(error)))
    detail: Message = error_details_pb2.QuotaFailure(violations=[violation])
    return detail


def _model(error: GhnServiceError) -> Message:
    detail: Message = error_details_pb2.ResourceInfo(resource_type="ghn.v1.Model", description=shorten(str(error)))
    return detail


_CODE = grpc.StatusCode
STATUSES: dict[type[GhnServiceError], StatusRow] = {
    errors.InvalidArchitectureError: StatusRow(_CODE.INVALID_ARGUMENT, "INVALID_ARCHITECTURE", _bad_request),
    errors.InvalidOptionError: StatusRow(_CODE.INVALID_ARGUMENT, "INVALID_OPTION", _bad_request),
    errors.UnsupportedArchitectureError: StatusRow(_CODE.UNIMPLEMENTED, "UNSUPPORTED_ARCHITECTURE", _bad_request),
    errors.UnsupportedOptionError: StatusRow(_CODE.UNIMPLEMENTED, "UNSUPPORTED_OPTION", _bad_request),
    errors.LimitExceededError: StatusRow(_CODE.RESOURCE_EXHAUSTED, "LIMIT_EXCEEDED", _quota),
    errors.OverloadedError: StatusRow(_CODE.RESOURCE_EXHAUSTED, "OVERLOADED", retry=True),
    errors.OutOfMemoryError: StatusRow(_CODE.RESOURCE_EXHAUSTED, "OUT_OF_MEMORY", retry=True),
    errors.UnknownModelError: StatusRow(_CODE.NOT_FOUND, "UNKNOWN_MODEL", _model),
    errors.CheckpointError: StatusRow(_CODE.FAILED_PRECONDITION, "CHECKPOINT_BROKEN", _model),
    errors.UnavailableError: StatusRow(_CODE.UNAVAILABLE, "UNAVAILABLE", retry=True),
    errors.DeadlineExceededError: StatusRow(_CODE.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
    errors.RequestCancelledError: StatusRow(_CODE.CANCELLED, "CANCELLED"),
    errors.PredictionError: StatusRow(_CODE.INTERNAL, "PREDICTION_FAILED"),
    errors.GhnServiceError: StatusRow(_CODE.INTERNAL, "INTERNAL", is_told=False),
}
"""Status by class of error; a class without a row has that of its nearest base."""

UNKNOWN_ERROR = STATUSES[GhnServiceError]


def status_row(error: BaseException) -> StatusRow:
    """The row of an error; that of unknown ones for what is not ours."""
    return next((STATUSES[base] for base in type(error).__mro__ if base in STATUSES), UNKNOWN_ERROR)


def encode_status(error: BaseException, *, request_id: str) -> RpcStatus:
    """The status that an error becomes; under 8 KB, and without anything of the server's inside.

    Args:
        error: Any exception.
        request_id: Identifier of the request in the logs.
    """
    row = status_row(error)
    text = shorten(str(error)) if row.is_told else f"internal error; the server's log has it under {request_id!r}"
    info = error_details_pb2.ErrorInfo(reason=row.reason, domain=DOMAIN, metadata={"request_id": request_id})
    details: list[Message] = [info]
    metadata: tuple[tuple[str, str | bytes], ...] = ()
    if row.detail is not None and isinstance(error, GhnServiceError):
        details.append(row.detail(error))
    if row.retry:
        delay = Duration()
        delay.FromMilliseconds(int(RETRY_AFTER_S * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
        metadata = ((PUSHBACK_KEY, str(int(RETRY_AFTER_S * 1000))),)
    status = status_pb2.Status(code=row.code.value[0], message=text)
    for detail in details:
        status.details.add().Pack(detail)
    return RpcStatus(row.code, text, (*metadata, (STATUS_DETAILS_KEY, status.SerializeToString())))


def shorten(text: str) -> str:
    """The text, cut to what fits into the trailers of a call."""
    return text if len(text) <= MAX_TEXT_CHARACTERS else text[: MAX_TEXT_CHARACTERS - 1] + "…"
