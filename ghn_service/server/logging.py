"""Structured logs on standard error: one line per call, each with the request's identifier.

Everything logs through ``logging``; structlog formats. A program that embeds the server keeps its own configuration,
since only the command line calls ``configure_logging``.
"""

from __future__ import annotations

import io
import logging
import sys
from typing import TextIO

import structlog


def configure_logging(log_format: str, level: str) -> None:
    """Sends the logs of this process to standard error.

    Args:
        log_format: ``console`` for people, ``json`` for machines.
        level: Least level, such as ``"INFO"``.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(make_formatter(log_format, colors=sys.stderr.isatty()))
    logging.basicConfig(handlers=[handler], level=level, force=True)


def _escape(text: str, kept: str = "") -> str:
    """The text without what moves a terminal's cursor: clients choose parts of it."""
    return "".join(sign if sign.isprintable() or sign in kept else repr(sign)[1:-1] for sign in text)


def _escape_texts(
    logger: structlog.types.WrappedLogger, name: str, entry: structlog.types.EventDict
) -> structlog.types.EventDict:
    return {key: _escape(value) if isinstance(value, str) else value for key, value in entry.items()}


def _escaped_traceback(stream: TextIO, exc_info: structlog.types.ExcInfo) -> None:
    text = io.StringIO()
    structlog.dev.plain_traceback(text, exc_info)
    stream.write(_escape(text.getvalue(), "\n"))


def make_formatter(log_format: str, *, colors: bool = False) -> logging.Formatter:
    """Formats a record as one line with all that is bound to it; local variables are left out of tracebacks.

    Args:
        log_format: ``console`` for people, ``json`` for machines.
        colors: Whether the console shows colours.
    """
    before: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderers: list[structlog.types.Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if log_format == "json"
        else [_escape_texts, structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=_escaped_traceback)]
    )
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=before, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderers]
    )
