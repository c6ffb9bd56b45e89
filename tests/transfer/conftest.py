from __future__ import annotations

from collections.abc import Iterator

import pytest

from ghn_client.client import GHNClient


@pytest.fixture(scope="module")
def client() -> Iterator[GHNClient]:
    """A client of a server in this process."""
    with GHNClient.embedded() as client:
        yield client
