"""The table of statuses covers the family of errors, and its reasons are unique."""

from __future__ import annotations

import base64
from urllib.parse import quote

import grpc
import pytest
from google.rpc import status_pb2

from ghn_service import errors
from ghn_service.errors import GhnServiceError
from ghn_service.server.calls import STATUS_DETAILS_KEY, STATUSES, encode_status, status_row

OFFLINE_ONLY = {errors.DataError, errors.TrainingError}
FAMILY = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, GhnServiceError) and value not in OFFLINE_ONLY
]
STARTUP_ONLY = {errors.ConfigurationError}


@pytest.mark.parametrize("kind", [kind for kind in FAMILY if kind not in STARTUP_ONLY])
def test_every_error_has_a_row(kind: type[GhnServiceError]) -> None:
    assert kind in STATUSES


def test_reasons_tell_causes_apart() -> None:
    reasons = [row.reason for row in STATUSES.values()]
    assert len(set(reasons)) == len(reasons)


def test_strangers_are_internal_and_silent() -> None:
    row = status_row(ZeroDivisionError("secret"))
    assert (row.code, row.is_told) == (grpc.StatusCode.INTERNAL, False)


@pytest.mark.parametrize("kind", STATUSES)
def test_code_and_packed_status_agree(kind: type[GhnServiceError]) -> None:
    status = encode_status(kind("because", field="model"), request_id="r")
    packed = status_pb2.Status.FromString(dict(status.trailing_metadata)[STATUS_DETAILS_KEY])
    assert packed.code == status.code.value[0]
    assert packed.message == status.details


@pytest.mark.parametrize("kind", STATUSES)
def test_only_what_may_succeed_later_says_so(kind: type[GhnServiceError]) -> None:
    status = encode_status(kind("because"), request_id="r")
    packed = status_pb2.Status.FromString(dict(status.trailing_metadata)[STATUS_DETAILS_KEY])
    asks_to_retry = any(detail.type_url.endswith("RetryInfo") for detail in packed.details)
    assert asks_to_retry == (kind in {errors.OverloadedError, errors.OutOfMemoryError, errors.UnavailableError})


@pytest.mark.parametrize("letter", ["a", "%", "\n", "ü", "語", "😀", "\udcff"])
@pytest.mark.parametrize("kind", STATUSES)
def test_a_status_is_small_whatever_it_says(kind: type[GhnServiceError], letter: str) -> None:
    status = encode_status(kind(9999 * letter, field=9999 * letter), request_id=128 * "r")
    details = base64.b64encode(dict(status.trailing_metadata)[STATUS_DETAILS_KEY])
    assert len(quote(status.details)) + len(details) < 6000
    assert status.details
