"""``ghn-server serve`` in a process of its own, as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 60.0


@dataclass
class ServerProcess:
    """A running server.

    Attributes:
        process: The process.
        address: Where it listens.
        log: Its log so far, as values.
    """

    process: subprocess.Popen[str]
    address: str = ""
    log: list[dict[str, object]] = field(default_factory=list)

    def wait(self) -> int:
        """Exit status, once it has ended."""
        return self.process.wait(STOP_TIMEOUT_S)


def server_command(*arguments: str) -> list[str]:
    """The command line of a server."""
    return [sys.executable, "-m", "ghn_service", "serve", *arguments]


def server_environment() -> dict[str, str]:
    """This process's variables without settings of a server."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GHN_")}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@contextmanager
def running_server(checkpoint: Path, *arguments: str) -> Iterator[ServerProcess]:
    """A server on a free port that is ready when the body begins, and gone after it."""
    command = server_command("--port", "0", "--checkpoint", str(checkpoint), "--log-format", "json", *arguments)
    process = subprocess.Popen(
        command, env=server_environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    server, is_ready = ServerProcess(process), threading.Event()

    def read_log() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("{"):
                server.log.append(json.loads(line))
                if server.log[-1]["event"] == "listening":
                    server.address = str(server.log[-1]["address"])
                if server.log[-1]["event"] == "ready":
                    is_ready.set()
        is_ready.set()

    reader = threading.Thread(target=read_log, daemon=True)
    reader.start()
    try:
        assert is_ready.wait(START_TIMEOUT_S), "the server did not start"
        assert process.poll() is None, server.log
        yield server
    finally:
        process.kill()
        process.wait()
        reader.join()
