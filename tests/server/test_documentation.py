"""The pages about protocol and server name everything that they are about."""

from __future__ import annotations

from pathlib import Path

import pytest

from ghn_client.wire.metadata import PredictionMetadata, encode_metadata
from ghn_service.server.settings import Settings
from ghn_service.server.statuses import STATUSES, StatusRow

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_is_documented(name: str) -> None:
    assert f"| `{name}` |" in (DOCS / "server.md").read_text()


@pytest.mark.parametrize("row", STATUSES.values(), ids=lambda row: row.reason)
def test_every_status_is_documented(row: StatusRow) -> None:
    assert f"| `{row.code.name}` | `{row.reason}` |" in (DOCS / "protocol.md").read_text()


def test_every_key_of_the_metadata_is_documented() -> None:
    page = (DOCS / "protocol.md").read_text()
    for key in encode_metadata(PredictionMetadata("", "", "", 0, "", ())):
        assert f"`{key}`" in page, key
