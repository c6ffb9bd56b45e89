"""The real server inside this process, on a free port of the loopback interface.

It needs the full package ghn-service, which is imported only when such a server is asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ghn_client.errors import EmbeddedServerError, SourceError
from ghn_client.sources import LocalSource


def start_embedded_server(checkpoint: str | Path | None = None) -> Any:
    """A running server (``ghn_service.server.app.RunningServer``) with its ``address``, to be stopped with ``stop``.

    Args:
        checkpoint: A hypernetwork: a file, a published name, or ``hf://OWNER/REPO/FILE``, which are fetched once; None
            for the trained one that comes with ghn-service.

    Raises:
        EmbeddedServerError: ghn-service is not installed, has no such checkpoint, or cannot load it.
    """
    try:
        app: Any = importlib.import_module("ghn_service.server.app")
        settings: Any = importlib.import_module("ghn_service.server.settings")
        errors: Any = importlib.import_module("ghn_service.errors")
    except ModuleNotFoundError as error:
        raise EmbeddedServerError(
            f"a server inside this process needs the package ghn-service ({error.name!r} is missing): "
            "install the whole project (`pip install .` in its folder), or give the address of a server"
        ) from error
    flags = {"host": "127.0.0.1", "port": 0, "device": ("auto",), "reflection": False, "drain_seconds": 0.0}
    flags |= {"max_peer_share": 1.0}  # this process is the only one that asks
    flags |= {"tracing": False, **dict.fromkeys(settings.OPTIONAL, "")}  # which variables may hold
    server: Any = None
    try:
        chosen = (str(checkpoint),) if checkpoint is not None else None
        server = app.start_server(settings.load_settings(**flags, checkpoints=chosen))
        server.wait_ready()
    except BaseException as error:
        if server is not None:
            server.stop(0.0)
        if isinstance(error, errors.GhnServiceError):
            raise EmbeddedServerError(f"the server inside this process cannot start: {error}") from error
        raise
    return server


@contextlib.contextmanager
def lent_source(server: Any, local: LocalSource) -> Iterator[str]:
    """Makes a source of this process known to the server in it; gives the name to ask for, good within the body.

    Raises:
        SourceError: Its file is damaged, or none of ours.
    """
    library: Any = importlib.import_module("ghn_service.transfer.library")
    sources: Any = importlib.import_module("ghn_service.transfer.source")
    errors: Any = importlib.import_module("ghn_service.errors")
    if local.path is None:
        digest = library.digest_of(local.structure, local.tensors)
        card = sources.SourceCard(**local.card)
        source = sources.Source(local.name, local.structure, local.tensors, card, digest)
    else:
        try:
            source = dataclasses.replace(library.load_source(local.path), name=local.name)
        except errors.SourceError as error:
            raise SourceError(str(error), field="source") from error
    with server.sources.lend(source) as name:
        yield name
