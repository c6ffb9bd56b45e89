"""The client's exceptions: one family, and for each the exit code that the command line gives (``docs/client.md``).

A message says what was expected, what came and what to do about it; where the server found the fault, it is the
server's own sentence. A class of its own has what a caller may want to handle in its own way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar


def listed(texts: Sequence[str], *, most: int = 10, separator: str = ", ") -> str:
    """The first of many names or sentences of a message, and how many more there are."""
    rest = len(texts) - most
    return separator.join(texts[:most]) + (f" and {rest} more" if rest > 0 else "")


class GhnClientError(Exception):
    """Base of everything this package raises on purpose.

    Attributes:
        exit_code: What ``ghn-client`` exits with when this ends it.
        field: Dotted path of the request field at fault, such as ``"architecture.onnx_model"``; empty if none is.
        request_id: Identifier of the request in the server's logs; empty if it never reached a server.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, field: str = "", request_id: str = "") -> None:
        super().__init__(message)
        self.field = field
        self.request_id = request_id


class InvalidOptionError(GhnClientError):
    """An option has an impossible value, or names something unknown; the message lists what is known."""

    exit_code = 2


def require_known(value: object, known: Iterable[object], *, field: str) -> None:
    """Raises ``InvalidOptionError`` unless ``value`` is one of ``known``."""
    if value not in (names := tuple(known)):
        raise InvalidOptionError(f"{field} must be one of {', '.join(map(str, names))}, got {value!r}", field=field)


class UnknownModelError(GhnClientError):
    """The server has no hypernetwork or source of that name."""

    exit_code = 2


class InvalidArchitectureError(GhnClientError):
    """The model is not a well-formed ONNX file, or not a network that could run."""

    exit_code = 3


class ExportError(GhnClientError):
    """A torch module could not be exported."""

    exit_code = 3


class UnsupportedArchitectureError(GhnClientError):
    """The model is well-formed but uses something that has no meaning for the service."""

    exit_code = 4


class SourceError(GhnClientError):
    """A source of weights cannot be used: it has no weights, is quantised, or has nothing in common with the target."""

    exit_code = 4


class UnsupportedModuleError(GhnClientError):
    """A way of fine-tuning has no meaning or no proof for this module, or finds nothing in it to tune."""

    exit_code = 4


class UnsupportedOptionError(GhnClientError):
    """The option is part of the protocol, but this server does not implement it."""

    exit_code = 4


class LimitExceededError(GhnClientError):
    """The model is larger than the server's limits; the same request will never succeed there."""

    exit_code = 4


class InfeasibleError(GhnClientError):
    """An exact solver has no solution that passes its own check, in this network and precision, for these labels."""

    exit_code = 4


class TemporaryError(GhnClientError):
    """The same request may succeed later.

    Attributes:
        retry_after_s: Seconds after which the server suggests another attempt; negative if it advises against one;
            None if it does not say.
    """

    retry_after_s: float | None = None


class ServerUnavailableError(TemporaryError):
    """No server answers at the address, or it went away and did not come back."""

    exit_code = 5


class DeadlineExceededError(GhnClientError):
    """The call took longer than its ``timeout_s``."""

    exit_code = 6


class AuthenticationError(GhnClientError):
    """The server refuses the token, it may not be sent over this connection, or TLS of the two sides does not fit."""

    exit_code = 7


class OverloadedError(TemporaryError):
    """The server is too busy."""

    exit_code = 8


class ServerError(GhnClientError):
    """The server, or something before it, failed or gave up in a way that is not the request's fault."""


class StreamCorruptedError(GhnClientError):
    """The stream broke the protocol: bytes lost, repeated or changed, or a wrong checksum."""


class EmbeddedServerError(GhnClientError):
    """The server inside the process cannot start (not installed, or no trained checkpoint to serve)."""


class FileError(GhnClientError, OSError):
    """A file cannot be read or written, is damaged, or was not written by this package.

    Attributes:
        strerror: The system's reason without the path, where it gave one.
    """

    def __init__(self, message: str, *, strerror: str | None = None) -> None:
        super().__init__(message)
        self.strerror = strerror


class LoadError(GhnClientError):
    """Weights do not fit the module or file that they should go into."""


class MissingExtraError(GhnClientError):
    """An optional library is needed; the message names it."""
