"""The real server inside this process, on a free port of the loopback interface.

It needs the full package ghn-service, which is imported only when such a server is asked for.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import TracebackType
from typing import Any

from ghn_client.errors import EmbeddedServerError

READY_TIMEOUT_S = 300.0


class EmbeddedServer:
    """Runs until it is stopped; a context manager that stops it.

    Args:
        checkpoint: A hypernetwork; None for the trained one that comes with ghn-service.
        device: ``auto``, ``cpu`` or ``cuda``.

    Attributes:
        address: Where it listens.

    Raises:
        EmbeddedServerError: ghn-service is not installed, has no such checkpoint, or cannot load it.
    """

    def __init__(self, checkpoint: str | Path | None = None, *, device: str = "auto") -> None:
        app, settings, errors = _import_service()
        flags: dict[str, Any] = {
            "host": "127.0.0.1",
            "port": 0,
            "device": (device,),
            "reflection": False,
            "drain_seconds": 0.0,
            "checkpoints": (str(checkpoint),) if checkpoint is not None else None,
        }
        self._server: Any = None
        try:
            self._server = app.start_server(settings.load_settings(**flags))
            self._server.wait_ready(READY_TIMEOUT_S)
        except errors.GhnServiceError as error:
            self.stop()
            raise EmbeddedServerError(f"the server inside this process cannot start: {error}") from error
        except BaseException:
            self.stop()
            raise
        self.address = str(self._server.address)

    def __enter__(self) -> EmbeddedServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Stops it at once; calls on their way are ended."""
        server, self._server = self._server, None
        if server is not None:
            server.stop(0.0)


def _import_service() -> tuple[Any, Any, Any]:
    try:
        return (
            importlib.import_module("ghn_service.server.app"),
            importlib.import_module("ghn_service.server.settings"),
            importlib.import_module("ghn_service.errors"),
        )
    except ModuleNotFoundError as error:
        raise EmbeddedServerError(
            f"a server inside this process needs the package ghn-service ({error.name!r} is missing): "
            "pip install ghn-service, or give the address of a server"
        ) from error
