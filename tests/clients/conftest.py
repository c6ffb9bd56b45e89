"""A server with a fake hypernetwork, and a client of it, for the tests of the client."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ghn_client import GHNClient
from ghn_service.server.app import RunningServer
from tests.server.fake_predictor import fake_server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with a fake hypernetwork."""
    with fake_server(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[GHNClient]:
    """A client of that server."""
    with GHNClient(server.address) as connected:
        yield connected
