"""A server with a fake hypernetwork, and a client of it, for the tests of the client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ghn_client import GHNClient
from ghn_service.hypernetwork.checkpoint import save_checkpoint
from ghn_service.server.app import RunningServer
from tests.hypernetwork.small_graphs import small_ghn
from tests.server.fake_predictor import fake_server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with a fake hypernetwork."""
    with fake_server(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small hypernetwork, untrained."""
    path = tmp_path_factory.mktemp("checkpoint") / "small.safetensors"
    save_checkpoint(small_ghn(), path)
    return path


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[GHNClient]:
    """A client of that server."""
    with GHNClient(server.address) as connected:
        yield connected
