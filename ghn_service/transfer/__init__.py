"""Weights from a trained network: exact where the target contains it."""

from pathlib import Path

BUNDLED_SOURCES = Path(__file__).resolve().parents[1] / "sources"
"""The folder of sources that come with the package; here, since settings are read before torch is imported."""
