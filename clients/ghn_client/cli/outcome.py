"""How a command ends: messages on stderr, an exit code per cause, nothing half-written after an interruption."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType

import typer
from rich.console import Console

from ghn_client.errors import GhnClientError, InvalidOptionError

INTERRUPTED = 130
TERMINATED = 143


def messages() -> Console:
    """Where people read: stderr, in colour on a terminal unless NO_COLOR is set."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def ending_well() -> Iterator[None]:
    """Ends the command with the exit code of whatever the body raises, and one line that says why."""
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except GhnClientError as error:
        where = f" (request {error.request_id})" if error.request_id else ""
        messages().print(f"[bold red]error:[/bold red] {_escape(str(error))}{where}")
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt as error:
        messages().print("interrupted")
        raise typer.Exit(INTERRUPTED) from error
    except BrokenPipeError as error:
        # The reader of stdout has gone; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from error
    finally:
        signal.signal(signal.SIGTERM, previous)


def warn(sentence: str) -> None:
    """Tells the user something that does not end the command."""
    messages().print(f"[yellow]warning:[/yellow] {_escape(sentence)}")


def refuse(sentence: str) -> InvalidOptionError:
    """The error of a combination of options that makes no sense."""
    return InvalidOptionError(sentence)


def _escape(text: str) -> str:
    return text.replace("[", "\\[")


def _terminate(number: int, frame: FrameType | None) -> None:
    raise SystemExit(TERMINATED)
