"""The seeded hypernetworks of the reference data, imported once per test session."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from ghn_service.hypernetwork.checkpoint import load_checkpoint
from ghn_service.hypernetwork.ghn import GraphHyperNetwork
from ghn_service.hypernetwork.import_checkpoint import import_checkpoint
from tests.shared_data import shared_path


@functools.cache
def golden_ghn(name: str) -> GraphHyperNetwork:
    """The hypernetwork ``name``, through import, our checkpoint format, and back."""
    source = shared_path(f"golden/{name}.safetensors")
    with tempfile.TemporaryDirectory() as folder:
        destination = Path(folder) / "imported.safetensors"
        import_checkpoint(source, destination)
        return load_checkpoint(destination)[0]
