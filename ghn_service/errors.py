"""The exceptions of the service: one family, one cause each, and one rule for what is a lack of memory.

Every message says what was expected, what came (name, value, shape) and what to do about it. A table in
``server/calls.py`` gives each class its gRPC status; the texts travel to the client, so they never contain paths of the
server.
"""

from __future__ import annotations

import errno
import traceback
from collections.abc import Iterator
from contextlib import contextmanager


class GhnServiceError(Exception):
    """Base of everything this package raises on purpose.

    Attributes:
        field: Dotted path of the request field at fault, such as ``"architecture.onnx_model"``; empty if none is.
    """

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class InvalidArchitectureError(GhnServiceError):
    """The bytes are not a well-formed ONNX model, or the model is not a network that could run."""


class UnsupportedArchitectureError(GhnServiceError):
    """The model is well-formed but uses something that has no meaning here (quantised weights, newer opset, ...)."""


class LimitExceededError(GhnServiceError):
    """The architecture is larger than this server's limits (nodes, tensors, parameters, nesting, expansion)."""


class InvalidOptionError(GhnServiceError):
    """An option of the request has an impossible value; ``field`` names it."""


class UnsupportedOptionError(GhnServiceError):
    """The option is part of the protocol, but this server does not implement it."""


class UnknownModelError(GhnServiceError):
    """No hypernetwork of that name is loaded, or the library has no such source."""


class CheckpointError(GhnServiceError):
    """A checkpoint file is damaged, of another kind, or does not fit its own configuration."""


class SourceError(GhnServiceError):
    """A source of weights is damaged, has no weights, or has nothing in common with the target."""


class DataError(GhnServiceError):
    """A data set is missing, broken, or of a layout that no loader reads."""


class TrainingError(GhnServiceError):
    """A training run cannot start, go on or be resumed."""


class PredictionError(GhnServiceError):
    """The hypernetwork gave values that are no weights (NaN or infinity)."""


class UnauthenticatedError(GhnServiceError):
    """The call brings no token that this server knows."""


class OverloadedError(GhnServiceError):
    """The queue is full; the same request may succeed later."""


class OutOfMemoryError(GhnServiceError):
    """The device has not enough memory for this request."""


class DeviceLostError(GhnServiceError):
    """The device fails at everything from now on; only another process can use it again."""


class DeadlineExceededError(GhnServiceError):
    """The request took longer than the client or the server allows."""


class RequestCancelledError(GhnServiceError):
    """The client no longer wants the answer."""


class UnavailableError(GhnServiceError):
    """The server cannot answer now, since it is starting or stopping; the same request may succeed later."""


class ConfigurationError(GhnServiceError):
    """The server cannot start with these settings."""


TEXTS_OF_FAILED_ALLOCATIONS = ("DefaultCPUAllocator", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What torch says where it has no class of its own for a lack of memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is a failed allocation, whichever way Python, the system or torch says it."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, MemoryError | OutOfMemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's own
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in TEXTS_OF_FAILED_ALLOCATIONS)


def reason_of(error: Exception) -> str:
    """Why a file could not be read or written, without its folder."""
    return error.strerror or type(error).__name__ if isinstance(error, OSError) else str(error)


@contextmanager
def memory_errors(message: str) -> Iterator[None]:
    """Turns every failed allocation of the body into an ``OutOfMemoryError``, and lets go of what the body held.

    Args:
        message: What the user can do about it.

    Raises:
        OutOfMemoryError: The body ran out of memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # else the error keeps the tensors of its frames
        raise OutOfMemoryError(message) from error
