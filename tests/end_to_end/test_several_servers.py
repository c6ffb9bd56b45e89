"""A client of three servers: one is killed and one drained under load, and no call fails."""

from __future__ import annotations

import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from ghn_client import GHNClient
from ghn_service.hypernetwork.checkpoint import save_checkpoint
from tests.end_to_end.server_process import ServerProcess, running_server
from tests.hypernetwork.small_graphs import small_ghn
from tests.server.patience import wait_until
from tests.server.small_models import LARGE, TINY

pytestmark = pytest.mark.xdist_group("server process")
NUM_CALLERS = 4


def num_calls(server: ServerProcess) -> int:
    """Predictions that a server has finished."""
    return sum(line.get("method") == "PredictWeights" and line.get("code") == "OK" for line in server.log)


def test_no_call_fails_while_servers_come_and_go(tmp_path: Path) -> None:
    save_checkpoint(small_ghn(), path := tmp_path / "small.safetensors")
    stop, done = threading.Event(), threading.Semaphore(0)
    with ExitStack() as stack:
        flags = ("--cache-bytes", "0", "--drain-seconds", "2", "--device", "cpu")
        servers = [stack.enter_context(running_server(path, *flags)) for _ in range(3)]
        killed, drained, kept = servers
        address = "ipv4:" + ",".join(server.address for server in servers)
        client = stack.enter_context(GHNClient(address))
        expected = {model: bytes(client.predict(model).buffer) for model in (TINY, LARGE)}

        def call_on_and_on(index: int) -> int:
            number = 0
            while not stop.is_set():
                model = LARGE if (index + number) % 4 == 0 else TINY
                assert bytes(client.predict(model).buffer) == expected[model]
                number += 1
                done.release()
            return number

        with ThreadPoolExecutor(NUM_CALLERS) as callers:
            calls = [callers.submit(call_on_and_on, index) for index in range(NUM_CALLERS)]
            try:
                wait_until(lambda: all(num_calls(server) >= 2 for server in servers))
                killed.process.kill()
                wait_for_more(done, 12)
                drained.process.send_signal(signal.SIGTERM)
                assert drained.wait() == 0
                before = num_calls(kept)
                wait_for_more(done, 12)
                wait_until(lambda: num_calls(kept) >= before + 12)
            finally:
                stop.set()
            assert all(call.result() > 0 for call in calls)


def wait_for_more(done: threading.Semaphore, number: int) -> None:
    """Waits for further calls to end."""
    while done.acquire(blocking=False):
        pass
    for _ in range(number):
        assert done.acquire(timeout=60)
