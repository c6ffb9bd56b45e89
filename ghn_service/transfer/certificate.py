"""Whether the target computes what the source computes (placeholder for the walk)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ghn_service.transfer.alignment import Alignment
from ghn_service.transfer.maps import Relations
from ghn_service.transfer.network import Network


def find_differences(
    target: Network, source: Network, alignment: Alignment, relations: Relations, steps: Mapping[str, Any]
) -> list[str]:
    """Sentences."""
    return []
