from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ghn_service.errors import CheckpointError
from ghn_service.hypernetwork.checkpoint import ModelCard, load_checkpoint, save_checkpoint
from tests.hypernetwork.small_graphs import CONFIGS, small_ghn

CARD = ModelCard("cifar10", ("cat", "dog"), "DeepNets-1M", "75 epochs", {"accuracy": 0.5})


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "ghn.safetensors"
    save_checkpoint(small_ghn(), path, card=CARD)
    return path


def resave(path, *, change_tensors=None, change_metadata=None):
    """Writes the file again with something changed."""
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(path)
    if change_tensors:
        change_tensors(tensors)
    if change_metadata:
        change_metadata(metadata)
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize("kind", CONFIGS)
def test_round_trip(kind, tmp_path):
    ghn = small_ghn(CONFIGS[kind])
    written = save_checkpoint(ghn, tmp_path / "ghn.safetensors", card=CARD)
    loaded, summary = load_checkpoint(tmp_path / "ghn.safetensors")
    torch.testing.assert_close(loaded.state_dict(), ghn.state_dict(), rtol=0, atol=0)
    assert loaded.config == ghn.config
    assert not loaded.training
    assert summary == written
    assert (summary.kind, summary.card, summary.num_parameters) == (kind, CARD, ghn.num_parameters)


def test_same_hypernetwork_gives_the_same_digest(tmp_path):
    first, second, other = (
        save_checkpoint(small_ghn(seed=seed), tmp_path / "ghn.safetensors").digest for seed in (0, 0, 1)
    )
    assert first == second != other


def test_vocabulary_is_in_the_metadata_by_name(saved):
    with safe_open(saved, "pt") as file:
        description = json.loads(file.metadata()["ghn_checkpoint"])
    assert description["config"]["op_types"][:2] == ["max_pool", "avg_pool"]


def test_half_precision_checkpoints_are_read_as_float32(saved):
    resave(saved, change_tensors=lambda tensors: tensors.update({k: v.bfloat16() for k, v in tensors.items()}))
    assert {tensor.dtype for tensor in load_checkpoint(saved)[0].state_dict().values()} == {torch.float32}


def change_description(edit):
    def change(metadata):
        description = json.loads(metadata["ghn_checkpoint"])
        edit(description)
        metadata["ghn_checkpoint"] = json.dumps(description)

    return change


def change_config(**changes):
    return change_description(lambda description: description["config"].update(changes))


@pytest.mark.parametrize(
    "change",
    [
        lambda metadata: metadata.clear(),
        lambda metadata: metadata.update(ghn_checkpoint="{"),
        lambda metadata: metadata.update(ghn_checkpoint="[]"),
        change_description(lambda description: description.pop("format")),
        change_description(lambda description: description.update(format="ghn-checkpoint/2")),
        change_description(lambda description: description.pop("config")),
        change_description(lambda description: description.update(config=[])),
        change_description(lambda description: description.update(card=[])),
        change_description(lambda description: description["card"].update(price=3)),
        change_config(hidden_channels=32),
        change_config(num_layers=3),
        change_config(num_layers=-1),
        change_config(encoder="gated_gnn"),
        change_config(future_option=1),
        change_config(op_types=["input"]),
    ],
)
def test_metadata_that_does_not_fit_is_refused(saved, change):
    resave(saved, change_metadata=change)
    with pytest.raises(CheckpointError):
        load_checkpoint(saved)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("output_norm.weight"),
        lambda tensors: tensors.update(surplus=torch.zeros(1)),
        lambda tensors: tensors.update({"output_norm.weight": torch.zeros(3)}),
        lambda tensors: tensors.update({"output_norm.weight": torch.zeros(16, dtype=torch.int64)}),
    ],
)
def test_tensors_that_do_not_fit_are_refused(saved, change):
    resave(saved, change_tensors=change)
    with pytest.raises(CheckpointError):
        load_checkpoint(saved)


@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", b"\xff" * 64], ids=["empty", "pickle", "noise"])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        load_checkpoint(path)


def test_truncated_files_are_refused(saved):
    saved.write_bytes(saved.read_bytes()[:-1])
    with pytest.raises(CheckpointError):
        load_checkpoint(saved)


def test_missing_files_and_folders_are_refused(tmp_path):
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(CheckpointError):
            load_checkpoint(path)


def test_messages_name_no_folder(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "absent")
    assert str(tmp_path) not in str(caught.value)


def test_nothing_is_left_when_writing_fails(tmp_path):
    with pytest.raises(CheckpointError):
        save_checkpoint(small_ghn(), tmp_path / "absent" / "ghn.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_as_readable_as_any_new_file(saved, tmp_path):
    (tmp_path / "other").touch()
    assert saved.stat().st_mode == (tmp_path / "other").stat().st_mode
