"""A connection to a server: address, credentials, deadlines and retries, safe in forked processes.

Retries repeat the whole call: it is deterministic, so nothing is lost but time, and a stream that breaks in the middle
is covered as well (gRPC's own retry policy ends with the first message). See gRFC A6 for the pushback.
"""

from __future__ import annotations

import ipaddress
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import grpc

from ghn_client.errors import (
    AuthenticationError,
    DeadlineExceededError,
    GhnClientError,
    InvalidOptionError,
    OverloadedError,
    TemporaryError,
)
from ghn_client.rpc_errors import error_from_rpc

MAX_ATTEMPTS = 4
FIRST_BACKOFF_S = 0.25
LAST_BACKOFF_S = 5.0
MAX_MESSAGE_BYTES = 64 << 20
KEEPALIVE_MS = 30_000
KEEPALIVE_TIMEOUT_MS = 10_000

_OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.enable_retries", 0),
    # A server that has vanished is noticed during a call; one that is only busy answers these questions.
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.http2.max_pings_without_data", 0),
)
_SCHEMES = ("dns:", "ipv4:", "ipv6:")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """How to trust the server, and how to be trusted by it.

    Attributes:
        root_certificates: PEM file of the authorities to trust; None for those of the system.
        certificate: PEM file of the client's own certificate, for servers that ask for one.
        private_key: PEM file of its key.
    """

    root_certificates: Path | None = None
    certificate: Path | None = None
    private_key: Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """The files as gRPC takes them.

        Raises:
            AuthenticationError: A file cannot be read.
        """
        try:
            contents = [path.read_bytes() if path else None for path in self._paths()]
        except OSError as error:
            raise AuthenticationError(f"cannot read the TLS file {error.filename!r}: {error.strerror}") from error
        roots, certificate, key = contents
        return grpc.ssl_channel_credentials(roots, private_key=key, certificate_chain=certificate)

    def _paths(self) -> tuple[Path | None, Path | None, Path | None]:
        return self.root_certificates, self.certificate, self.private_key


def is_loopback(address: str) -> bool:
    """Whether what is sent to ``address`` stays on this machine."""
    if address.startswith("unix:"):
        return True
    target = address.rpartition("/")[2]
    target = target.partition(":")[2] if target.startswith(_SCHEMES) else target
    host = target.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Connection:
    """Dials on first use, again in every process that forks off, and retries what may be retried.

    Args:
        address: ``host:port``, or any gRPC target.
        token: Bearer token; sent over TLS or to this machine only.
        tls: How to encrypt; None for plain text.
        max_attempts: Attempts per call.

    Raises:
        InvalidOptionError: The address is empty.
        AuthenticationError: The token would travel in plain text.
    """

    def __init__(
        self, address: str, *, token: str | None = None, tls: TlsFiles | None = None, max_attempts: int = MAX_ATTEMPTS
    ) -> None:
        if not address.strip():
            raise InvalidOptionError("expected an address such as 'localhost:50051', got an empty one", field="address")
        if token and tls is None and not is_loopback(address):
            raise AuthenticationError(
                f"the token would be sent to {address} in plain text; use TLS (tls=True), or a server on this machine"
            )
        self.address = address
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._tls = tls
        self._max_attempts = max_attempts
        self._lock = threading.Lock()
        self._channel: grpc.Channel | None = None
        self._pid = 0

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with every call."""
        return self._metadata

    def channel(self) -> grpc.Channel:
        """The channel of this process; a forked process must not use its parent's."""
        with self._lock:
            if self._channel is None or self._pid != os.getpid():
                self._channel, self._pid = self._dial(), os.getpid()
            return self._channel

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
        self,
        attempt: Callable[[grpc.Channel, float], Result],
        *,
        timeout_s: float,
        max_attempts: int | None = None,
    ) -> Result:
        """Runs ``attempt`` until it succeeds, fails for good, or runs out of time or attempts.

        Args:
            attempt: Makes one call; gets the channel and the seconds that are left.
            timeout_s: Seconds for all attempts together.
            max_attempts: Attempts; None for those of the connection.

        Raises:
            GhnClientError: The last attempt's cause, as one of ours.
        """
        if not timeout_s > 0:
            raise InvalidOptionError(f"expected a timeout of more than 0 seconds, got {timeout_s}", field="timeout_s")
        end = time.monotonic() + timeout_s
        last = self._max_attempts if max_attempts is None else max_attempts
        for number in range(1, last + 1):
            try:
                return attempt(self.channel(), max(end - time.monotonic(), 0.001))
            except grpc.RpcError as raised:
                error = error_from_rpc(raised, address=self.address)
                wait_s = _wait_s(error, number)
                if wait_s is None or number == last:
                    raise error from raised
                if time.monotonic() + wait_s >= end:
                    raise _out_of_time(error, timeout_s) from raised
                time.sleep(wait_s)
        raise AssertionError("the last attempt returns or raises")

    def _dial(self) -> grpc.Channel:
        if self._tls is None:
            return grpc.insecure_channel(self.address, options=_OPTIONS)
        return grpc.secure_channel(self.address, self._tls.credentials(), options=_OPTIONS)


def _wait_s(error: GhnClientError, number: int) -> float | None:
    """Seconds to wait before the next attempt; None if there must not be one."""
    if not isinstance(error, TemporaryError):
        return None
    if error.retry_after_s is not None:
        return error.retry_after_s if error.retry_after_s >= 0 else None
    if isinstance(error, OverloadedError):
        return None
    return min(FIRST_BACKOFF_S * 2.0 ** (number - 1), LAST_BACKOFF_S) * random.uniform(0.8, 1.2)


def _out_of_time(error: GhnClientError, timeout_s: float) -> GhnClientError:
    if isinstance(error, OverloadedError):
        return error
    return DeadlineExceededError(f"no answer within {timeout_s:g} seconds; the last failure: {error}")
