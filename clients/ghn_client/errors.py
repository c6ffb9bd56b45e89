"""The client's exceptions: one family, one cause each, and the exit code that the command line gives for it.

A message says what was expected, what came and what to do about it; where the server found the fault, it is the
server's own sentence. Exit codes are documented in ``docs/cli.md``.
"""

from __future__ import annotations

from typing import ClassVar


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


class InvalidArchitectureError(GhnClientError):
    """The model is not a well-formed ONNX file, or not a network that could run."""

    exit_code = 3


class ExportError(GhnClientError):
    """A torch module could not be exported."""

    exit_code = 3


class UnsupportedArchitectureError(GhnClientError):
    """The model is well-formed but uses something that has no meaning for the service."""

    exit_code = 4


class UnsupportedOptionError(GhnClientError):
    """The option is part of the protocol, but this server does not implement it."""

    exit_code = 4


class LimitExceededError(GhnClientError):
    """The model is larger than the server's limits; the same request will never succeed there."""

    exit_code = 4


class InvalidOptionError(GhnClientError):
    """An option has an impossible value; ``field`` names it."""

    exit_code = 2


class UnknownModelError(GhnClientError):
    """The server has no hypernetwork of that name."""

    exit_code = 2


class TemporaryError(GhnClientError):
    """The same request may succeed later.

    Attributes:
        retry_after_s: Seconds after which the server suggests another attempt; negative if it advises against one;
            None if it does not say.
    """

    def __init__(
        self, message: str, *, field: str = "", request_id: str = "", retry_after_s: float | None = None
    ) -> None:
        super().__init__(message, field=field, request_id=request_id)
        self.retry_after_s = retry_after_s


class ServerUnavailableError(TemporaryError):
    """No server answers at the address, or it went away and did not come back."""

    exit_code = 5


class DeadlineExceededError(GhnClientError):
    """The call took longer than its ``timeout_s``."""

    exit_code = 6


class AuthenticationError(GhnClientError):
    """The server refuses the token, or the token may not be sent over this connection."""

    exit_code = 7


class OverloadedError(TemporaryError):
    """The server is too busy."""

    exit_code = 8


class CancelledError(GhnClientError):
    """The call was cancelled before it ended."""


class ServerError(GhnClientError):
    """The server failed in a way that is not the request's fault."""


class StreamCorruptedError(GhnClientError):
    """The stream broke the protocol: bytes lost, repeated or changed, or a wrong checksum."""


class PredictionFileError(GhnClientError):
    """A file of predicted weights is damaged or was not written by this package."""


class LoadError(GhnClientError):
    """Predicted weights do not fit the module or file that they should go into."""


class EmbeddedServerError(GhnClientError):
    """The server inside the process cannot start (not installed, or no trained checkpoint to serve)."""
