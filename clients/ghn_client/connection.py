"""A connection to a server: address, credentials, deadlines, retries and statuses as errors, safe in forked processes.

Retries repeat the whole call: it is deterministic, so nothing is lost but time, and a stream that breaks in the middle
is covered as well (gRPC's own retry policy ends with the first message). See gRFC A6 for the pushback.
"""

from __future__ import annotations

import ipaddress
import json
import os
import random
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar, cast

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from ghn_client import errors
from ghn_client.errors import (
    AuthenticationError,
    DeadlineExceededError,
    GhnClientError,
    InvalidOptionError,
    OverloadedError,
    TemporaryError,
)
from ghn_client.wire.codec import SERVICE

MAX_ATTEMPTS = 4
FIRST_BACKOFF_S = 0.25
LAST_BACKOFF_S = 5.0
KEEPALIVE_MS = 30_000
CALL_LIMIT_TEXT = "oncurrent RPC limit"
"""How gRPC refuses a call for which a server has no thread, before the server can say that it is only busy."""
DEFAULT_PORT = 50051

_OPTIONS: Sequence[tuple[str, int | str]] = (
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.enable_retries", 0),
    # A server that has vanished is noticed during a call; one that is only busy answers these questions.
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
)
_SCHEMES = ("dns:", "ipv4:", "ipv6:")
"""Targets that may stand for several servers; any other address is one server."""
_BALANCED = {"loadBalancingConfig": [{"round_robin": {}}], "healthCheckConfig": {"serviceName": SERVICE}}
"""Calls go to all servers in turn, but for those that say "not serving" or do not answer (gRFC A17)."""
_PUSHBACK_KEY = "grpc-retry-pushback-ms"
_CODE = grpc.StatusCode
_BY_REASON: Mapping[str, type[GhnClientError]] = {
    "INVALID_ARCHITECTURE": errors.InvalidArchitectureError,
    "INVALID_OPTION": InvalidOptionError,
    "UNSUPPORTED_ARCHITECTURE": errors.UnsupportedArchitectureError,
    "UNSUPPORTED_OPTION": errors.UnsupportedOptionError,
    "LIMIT_EXCEEDED": errors.LimitExceededError,
    "OVERLOADED": OverloadedError,
    "OUT_OF_MEMORY": OverloadedError,
    "SOURCE_UNUSABLE": errors.SourceError,
    "UNKNOWN_MODEL": errors.UnknownModelError,
}
_BY_CODE: Mapping[grpc.StatusCode, type[GhnClientError]] = {
    _CODE.INVALID_ARGUMENT: InvalidOptionError,
    _CODE.OUT_OF_RANGE: InvalidOptionError,
    _CODE.UNIMPLEMENTED: errors.UnsupportedOptionError,
    _CODE.RESOURCE_EXHAUSTED: errors.LimitExceededError,
    _CODE.NOT_FOUND: errors.UnknownModelError,
    _CODE.UNAVAILABLE: errors.ServerUnavailableError,
    _CODE.DEADLINE_EXCEEDED: DeadlineExceededError,
    _CODE.UNAUTHENTICATED: AuthenticationError,
    _CODE.PERMISSION_DENIED: AuthenticationError,
    _CODE.DATA_LOSS: errors.StreamCorruptedError,
}
Result = TypeVar("Result")


class Connection:
    """Dials on first use, again in every process that forks off, and retries what may be retried.

    Args and errors as for ``GHNClient``, but for ``tls``: PEM files of the authorities to trust (None: gRPC's own), of
    the client's certificate and of its key; None for plain text.

    Attributes:
        metadata: What goes with every call.
        is_over: Whether the server was in this process and has stopped, so that no call makes sense any more.
    """

    def __init__(
        self,
        address: str,
        *,
        token: str | None,
        tls: Sequence[Path | None] | None,
        server_name: str = "",
        max_attempts: int,
    ) -> None:
        if not address.strip():
            raise InvalidOptionError("expected an address such as 'localhost:50051', got an empty one", field="address")
        address = _with_port(address.strip())
        if address.startswith("https://"):
            address, tls = address.removeprefix("https://"), tls or (None, None, None)
        if token and not (token.isascii() and token.isprintable() and " " not in token):
            raise AuthenticationError("expected a token of printable ASCII characters without blanks")
        if token and tls is None and not _is_loopback(address):
            raise AuthenticationError(
                f"the token would be sent to {address} in plain text; use TLS (tls=True), or a server on this machine"
            )
        self.is_over = False
        self.address = address
        self.metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._tls = tls
        self._options = [*_OPTIONS]
        if _is_loopback(address):
            self._options.append(("grpc.enable_http_proxy", 0))  # a proxy of the environment would read the token
        if address.startswith(_SCHEMES):
            self._options.append(("grpc.service_config", json.dumps(_BALANCED)))
        if server_name:
            self._options.append(("grpc.default_authority", server_name))
        self._max_attempts = max_attempts
        self._lock = threading.Lock()
        self._channel: grpc.Channel | None = None
        self._pid = 0

    def close(self) -> None:
        """Closes the channel; the next call would open a new one."""
        with self._lock:
            channel, self._channel = self._channel, None
            if channel is not None and self._pid == os.getpid():
                channel.close()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_lock": None, "_channel": None, "_pid": 0}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def call(
        self, attempt: Callable[[grpc.Channel, float], Result], *, timeout_s: float, max_attempts: int | None = None
    ) -> Result:
        """Runs ``attempt`` until it succeeds, fails for good, or runs out of time or attempts.

        Args:
            attempt: Makes one call; gets the channel and the seconds that are left.
            timeout_s: Seconds for all attempts together.
            max_attempts: Attempts; None for those of the connection.

        Raises:
            GhnClientError: The last attempt's cause, as one of ours.
        """
        if self.is_over:
            raise InvalidOptionError("this client is closed, and its server with it; make another GHNClient.embedded()")
        if not timeout_s > 0:
            raise InvalidOptionError(f"expected a timeout of more than 0 seconds, got {timeout_s}", field="timeout_s")
        end = time.monotonic() + timeout_s
        last = self._max_attempts if max_attempts is None else max_attempts
        for number in range(1, last + 1):
            try:
                return attempt(self._dialled(), max(end - time.monotonic(), 0.001))
            except grpc.RpcError as raised:
                error = _error_from_rpc(cast("grpc.Call", raised), self.address)  # what a channel raises is both
                wait_s = _wait_s(error, number)
                if wait_s is None or number == last:
                    raise error from raised
                if time.monotonic() + wait_s >= end:
                    if isinstance(error, OverloadedError):
                        raise error from raised
                    raise DeadlineExceededError(
                        f"no answer within {timeout_s:g} seconds; the last failure: {error}"
                    ) from raised
                time.sleep(wait_s)
        raise AssertionError("the last attempt returns or raises")

    def _dialled(self) -> grpc.Channel:
        """The channel of this process; a forked process must not use its parent's."""
        with self._lock:
            if self._channel is None or self._pid != os.getpid():
                self._pid = os.getpid()
                if self._tls is None:
                    self._channel = grpc.insecure_channel(self.address, options=self._options)
                else:
                    self._channel = grpc.secure_channel(self.address, _credentials(self._tls), options=self._options)
            return self._channel


def _with_port(address: str) -> str:
    """``address`` without ``http://``, and with our port where it is the bare name or number of a host."""
    scheme = "https://" if address.startswith("https://") else ""
    host = address.removeprefix(scheme).removeprefix("http://").rstrip("/" if "://" in address else "")
    is_name = ":" not in host and "/" not in host and "," not in host
    return scheme + (f"{host}:{DEFAULT_PORT}" if is_name or re.fullmatch(r"\[[0-9a-fA-F:]+\]", host) else host)


def _is_loopback(address: str) -> bool:
    """Whether what is sent to ``address`` stays on this machine, which an authority that finds it need not be."""
    if address.startswith("unix:"):
        return True
    target = address.partition(":")[2].removeprefix("///") if address.startswith(_SCHEMES) else address
    hosts = {part.rpartition(":")[0].strip("[]") for part in target.split(",")}
    try:
        return all(host == "localhost" or ipaddress.ip_address(host).is_loopback for host in hosts)
    except ValueError:
        return False


def _credentials(files: Sequence[Path | None]) -> grpc.ChannelCredentials:
    """The PEM files as gRPC takes them."""
    try:
        roots, certificate, key = (path.read_bytes() if path else None for path in files)
    except OSError as error:
        raise AuthenticationError(f"cannot read the TLS file {error.filename!r}: {error.strerror}") from error
    return grpc.ssl_channel_credentials(roots, private_key=key, certificate_chain=certificate)


def _wait_s(error: GhnClientError, number: int) -> float | None:
    """Seconds to wait before the next attempt; None if there must not be one."""
    if not isinstance(error, TemporaryError):
        return None
    if error.retry_after_s is not None:
        return error.retry_after_s if error.retry_after_s >= 0 else None
    if isinstance(error, OverloadedError):
        return None
    return min(FIRST_BACKOFF_S * 2.0 ** (number - 1), LAST_BACKOFF_S) * random.uniform(0.8, 1.2)


def _error_from_rpc(call: grpc.Call, address: str) -> GhnClientError:
    """The exception of ours that a failed call to ``address`` becomes: code, google.rpc details and retry pushback."""
    reason, fields, retry_after_s = "", {}, _pushback_s(call)
    try:
        status = rpc_status.from_call(call)
    except ValueError:  # the details contradict the status: a proxy has changed one of them
        status = None
    info, request, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    for packed in status.details if status is not None else ():
        if packed.Unpack(info):
            reason, fields["request_id"] = info.reason, info.metadata.get("request_id", "")
        elif packed.Unpack(request) and request.field_violations:
            fields["field"] = request.field_violations[0].field
        elif packed.Unpack(retry) and retry_after_s is None:
            retry_after_s = retry.retry_delay.ToTimedelta().total_seconds()
    kind = _BY_REASON.get(reason) or _BY_CODE.get(call.code(), errors.ServerError)
    text = call.details() or ""
    if not reason and call.code() is _CODE.RESOURCE_EXHAUSTED and CALL_LIMIT_TEXT in text:
        kind, retry_after_s = OverloadedError, 1.0
    if kind is errors.ServerUnavailableError:
        kind, text = _explain_unavailable(text or "connection lost", address)
    elif call.code() is _CODE.UNAUTHENTICATED:
        text += "; give one with token=... (of ghn-client: --token-file FILE, or the variable GHN_TOKEN)"
    elif kind is DeadlineExceededError:
        text = f"the server at {address} did not finish in time ({text or 'deadline exceeded'}); raise timeout_s"
    error = kind(text or f"the server at {address} gave no reason", **fields)
    if isinstance(error, TemporaryError):
        error.retry_after_s = retry_after_s
    return error


def _explain_unavailable(text: str, address: str) -> tuple[type[GhnClientError], str]:
    """What keeps a client from a server, told by gRPC's own text; faults of TLS do not go away by trying again."""
    if "CERTIFICATE_VERIFY_FAILED" in text or "Hostname Verification" in text:
        cause = (
            text.rpartition("CERTIFICATE_VERIFY_FAILED: ")[2] if "VERIFY_FAILED" in text else "made for another name"
        )
        return AuthenticationError, (
            f"the certificate of the server at {address} cannot be trusted ({cause.removesuffix(': OK')}); give its "
            "authority as root_certificates (--ca-file), or the name it was made for as server_name (--server-name)"
        )
    if "WRONG_VERSION_NUMBER" in text:
        return AuthenticationError, f"the server at {address} does not speak TLS, which this client asks for"
    hint = "check the address"
    if "failed to connect" in text and "Socket closed" in text:
        hint = (
            "it may ask for TLS (tls=True, --tls) or for a certificate of the client (client_certificate, --cert-file)"
        )
    return errors.ServerUnavailableError, f"no server answers at {address} ({text}); {hint}"


def _pushback_s(call: grpc.Call) -> float | None:
    for key, value in call.trailing_metadata() or ():
        if key == _PUSHBACK_KEY and isinstance(value, str):
            try:
                return int(value) / 1000
            except ValueError:
                return -1.0  # malformed means "do not retry" (gRFC A6)
    return None
