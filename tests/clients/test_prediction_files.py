"""Predictions as files: whole or not there at all, and checked when they are read."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ghn_client import GHNClient, Prediction
from ghn_client.errors import FileError
from tests.clients.small_modules import IMAGE, ConvNet
from tests.server.small_models import TINY


def test_a_saved_prediction_reads_back(client: GHNClient, tmp_path: Path) -> None:
    prediction = client.predict(ConvNet(), IMAGE, dtype="bfloat16")
    prediction.save(tmp_path / "weights.safetensors")
    loaded = Prediction.load(tmp_path / "weights.safetensors")
    assert loaded.buffer == prediction.buffer
    assert loaded.metadata == prediction.metadata
    assert all(torch.equal(loaded[name], prediction[name]) for name in prediction)
    by_library = load_file(tmp_path / "weights.safetensors")
    assert all(torch.equal(by_library[name], prediction[name]) for name in prediction)


def test_a_saved_file_has_the_usual_permissions_and_no_part_beside_it(client: GHNClient, tmp_path: Path) -> None:
    client.predict(TINY).save(tmp_path / "weights.safetensors")
    (tmp_path / "ordinary").touch()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["ordinary", "weights.safetensors"]
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_a_failed_write_leaves_the_earlier_file(client: GHNClient, tmp_path: Path) -> None:
    target = tmp_path / "weights.safetensors"
    target.write_bytes(b"earlier")
    prediction = client.predict(TINY)
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileError):
        prediction.save(tmp_path / "missing" / "weights.safetensors")
    with pytest.raises(FileError):
        prediction.save(tmp_path / "folder")
    assert target.read_bytes() == b"earlier"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "weights.safetensors"]


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: b"", lambda data: data[8:], lambda data: b"x" * 9]
)
def test_a_damaged_file_is_refused(damage: object, client: GHNClient, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(damage(bytes(client.predict(TINY).buffer)))
    with pytest.raises(FileError):
        Prediction.load(path)
