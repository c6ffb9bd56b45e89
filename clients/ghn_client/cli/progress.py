"""Progress of a prediction, on a terminal only."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TransferSpeedColumn

from ghn_client.cli.outcome import messages

if TYPE_CHECKING:
    from ghn_client.wire.codec import Progress as Event

_STAGES = {
    "queued": "waiting for a device",
    "encoding": "reading the architecture",
    "predicting": "predicting weights",
    "post_processing": "post-processing",
    "streaming": "receiving weights",
}


@contextlib.contextmanager
def shown_progress() -> Iterator[Callable[[Event], None]]:
    """A callback that draws a line on stderr, gone at the end; it does nothing where stderr is no terminal."""
    console = messages()
    if not console.is_terminal:
        yield lambda event: None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("asking the server", total=None)

        def show(event: Event) -> None:
            text = _STAGES.get(event.stage, event.stage)
            if event.queue_position:
                text += f" ({event.queue_position} requests ahead)"
            progress.update(task, description=text, total=event.total_bytes or None, completed=event.received_bytes)

        yield show
