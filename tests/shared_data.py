"""Where tests find reference data that is too large for this repository, and how they skip without it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("GHN_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def shared_path(relative: str) -> Path:
    """The file or folder ``relative`` of the reference data; skips the calling test where it is absent."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"reference data {relative!r} is not here; set GHN_SHARED to the folder that holds it")
    return path
