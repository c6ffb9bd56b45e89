"""Structured logs on standard error: one line per call, each with the request's identifier.

Everything logs through ``logging``; structlog formats. A program that embeds the server keeps its own configuration,
since only the command line calls ``configure_logging``.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import structlog

REQUEST_ID = "request_id"


def configure_logging(log_format: str, level: str) -> None:
    """Sends the logs of this process to standard error.

    Args:
        log_format: ``console`` for people, ``json`` for machines.
        level: Least level, such as ``"INFO"``.
    """
    shared: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderers = (
        [structlog.processors.dict_tracebacks, structlog.processors.JSONRenderer()]
        if log_format == "json"
        else [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderers]
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(handlers=[handler], level=level, force=True)


@contextmanager
def logged_as(request_id: str, method: str) -> Iterator[None]:
    """Everything that this thread logs in the body carries these two."""
    structlog.contextvars.bind_contextvars(**{REQUEST_ID: request_id}, method=method)
    try:
        yield
    finally:
        structlog.contextvars.unbind_contextvars(REQUEST_ID, "method")


def current_request_id() -> str:
    """Identifier of the request that this thread serves, or ""."""
    return str(structlog.contextvars.get_contextvars().get(REQUEST_ID, ""))
