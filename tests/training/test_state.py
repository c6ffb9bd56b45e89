"""Saved states survive crashes: whole or not there, the one before kept, damage noticed."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from ghn_service.errors import TrainingError
from ghn_service.training import state as state_module
from ghn_service.training.state import Progress, TrainingState, find_state, load_state, save_state


def make_state(step: int) -> TrainingState:
    weights = {"weight": torch.full((3,), float(step))}
    return TrainingState(
        "digest", {"seed": 0}, Progress(step=step), weights, weights, [{"state": {}, "param_groups": []}]
    )


def test_a_state_is_read_back_unchanged(tmp_path):
    path = save_state(make_state(7), tmp_path)
    read = load_state(path)
    assert read.progress == Progress(step=7)
    assert torch.equal(read.hypernetwork["weight"], torch.full((3,), 7.0))
    assert read.optimizers == [{"state": {}, "param_groups": []}]


def test_a_state_of_an_older_version_is_read(tmp_path):
    path = save_state(make_state(7), tmp_path)
    body = torch.load(path)
    for name in ("earlier_pools", "data"):
        del body[name]
    torch.save(body, path)
    read = load_state(path)
    assert (read.progress.step, read.earlier_pools, read.data) == (7, {}, "")


def test_the_newest_state_is_found(tmp_path):
    save_state(make_state(1), tmp_path)
    save_state(make_state(2), tmp_path)
    assert find_state(tmp_path).progress.step == 2


def test_a_damaged_state_falls_back_to_the_one_before(tmp_path):
    save_state(make_state(1), tmp_path)
    path = save_state(make_state(2), tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    assert find_state(tmp_path).progress.step == 1


def test_a_state_in_parts_is_read_back_whichever_part_is_damaged_the_one_before_is_used(tmp_path):
    save_state(make_state(1), tmp_path, part_bytes=1024)
    path = save_state(make_state(2), tmp_path, part_bytes=1024)
    parts = sorted(path.iterdir())
    assert len(parts) > 1
    assert all(part.stat().st_size <= 1024 for part in parts)
    assert find_state(tmp_path).progress == Progress(step=2)
    parts[1].unlink()
    assert find_state(tmp_path).progress.step == 1


def test_a_crash_between_two_parts_leaves_the_state_before(tmp_path, monkeypatch):
    save_state(make_state(1), tmp_path, part_bytes=1024)

    def crash(path, content):
        if path.name.startswith("001"):
            raise OSError("disk full")
        path.write_bytes(content)

    monkeypatch.setattr(state_module, "write_file", crash)
    with pytest.raises(OSError, match="disk full"):
        save_state(make_state(2), tmp_path, part_bytes=1024)
    assert find_state(tmp_path).progress.step == 1


def test_nothing_but_damaged_states_is_an_error(tmp_path):
    save_state(make_state(1), tmp_path).write_bytes(b"damaged")
    with pytest.raises(TrainingError):
        find_state(tmp_path)


def test_an_empty_folder_has_no_state(tmp_path):
    assert find_state(tmp_path) is None


def test_a_crash_while_writing_leaves_the_state_before(tmp_path, monkeypatch):
    save_state(make_state(1), tmp_path)

    def crash(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(state_module.torch, "save", crash)
    with pytest.raises(OSError, match="disk full"):
        save_state(make_state(2), tmp_path)
    monkeypatch.undo()
    assert find_state(tmp_path).progress.step == 1


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "state.pt"
    torch.save({"something": 1}, path)
    with pytest.raises(TrainingError):
        load_state(path)


def test_what_pickles_more_than_tensors_is_refused_without_torchs_advice(tmp_path):
    path = tmp_path / "state.pt"
    torch.save({"format": 1, "evil": Path("anything")}, path)
    with pytest.raises(TrainingError) as caught:
        load_state(path)
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("part_bytes", [None, 100_000], ids=["one file", "parts"])
def test_a_disk_without_room_leaves_the_state_before_and_no_part(tmp_path, part_bytes):
    save_state(make_state(1), tmp_path, part_bytes=part_bytes)
    before = sorted(path.name for path in tmp_path.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    state = make_state(2)
    state.hypernetwork["large"] = torch.zeros(100_000)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # what a full disk is to a program: a write fails
    try:
        with pytest.raises(OSError, match="cannot write"):
            save_state(state, tmp_path, part_bytes=part_bytes)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert find_state(tmp_path).progress.step == 1
