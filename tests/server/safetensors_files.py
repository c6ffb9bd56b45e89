"""Reads a safetensors file with nothing but the format's description."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ParsedFile:
    metadata: dict[str, str]
    tensors: dict[str, Any]


def read_file(data: bytes) -> ParsedFile:
    """Metadata and tensor entries of a file."""
    size = int.from_bytes(data[:8], "little")
    document = json.loads(data[8 : 8 + size])
    return ParsedFile(document.pop("__metadata__", {}), document)
