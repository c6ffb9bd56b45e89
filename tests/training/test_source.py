"""``ghn-train source``: it learns, resumes bit for bit, and what it writes computes what its card says."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from ghn_architectures.architecture import Interface
from ghn_architectures.registry import ARCHITECTURES, SOURCES
from ghn_client.finetune.images import Normalization
from ghn_service.errors import InvalidOptionError, TrainingError
from ghn_service.training import source as source_module
from ghn_service.training.evaluation.zero_shot import accuracy
from ghn_service.training.images import require_split
from ghn_service.training.settings import SourceRecipe, load_settings
from ghn_service.training.source import find_source_network, train_source
from ghn_service.transfer.library import load_source
from tests.training.made_images import coloured_images, normalization_of
from tests.training.test_command_line import run
from tests.training.written_images import write_image_folder

TINY = 'family = "resnet"\nwidths = [8, 16]\ndepths = [1, 1]\n'
CHANGES = ("epochs=5", "small_epochs=2", "small_size=12", "batch_size=16", "learning_rate=0.1")


@pytest.fixture
def tiny(tmp_path):
    (tmp_path / "tiny.toml").write_text(TINY)
    write_image_folder(tmp_path / "data", classes=3, count=192)
    return tmp_path


def train(folder, out, *changes):
    recipe = load_settings(None, (*CHANGES, *changes), SourceRecipe)
    return train_source(str(folder / "tiny.toml"), folder / "data", folder / out, recipe, licence="CC0")


def test_a_source_learns_and_its_file_is_the_network_of_its_card(tiny):
    summary = train(tiny, "run")
    assert summary.card.accuracy > 0.8
    source = load_source(tiny / "run" / "tiny.safetensors")
    assert source.digest == summary.digest
    card = source.card
    assert (card.licence, card.image_size, card.seed, card.class_names) == (
        "CC0",
        16,
        0,
        ("class0", "class1", "class2"),
    )
    module = find_source_network(str(tiny / "tiny.toml"), Interface(3, 3, 16)).build()
    missing, unknown = module.load_state_dict(source.tensors, strict=False)
    assert not unknown
    assert all(name.endswith("num_batches_tracked") for name in missing)
    images = require_split(tiny / "data", "test")
    measured = accuracy(module.eval(), images, Normalization(**card.normalization), batch_size=64)
    assert measured == pytest.approx(card.accuracy)


def test_a_stopped_source_goes_on_to_the_same_weights(tiny, monkeypatch):
    whole = train(tiny, "whole")
    advance, steps = source_module._Run.advance, []

    def interrupted(self, total):
        steps.append(self.step)
        if len(steps) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return advance(self, total)

    monkeypatch.setattr(source_module._Run, "advance", interrupted)
    assert train(tiny, "parts") is None
    parts = train(tiny, "parts")
    assert steps == list(range(len(steps)))
    assert (parts.card.accuracy, parts.num_bytes) == (whole.card.accuracy, whole.num_bytes)
    one, other = (load_source(tiny / out / "tiny.safetensors").tensors for out in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_folder_with_another_recipe_is_refused(tiny):
    train(tiny, "run", "epochs=2")
    with pytest.raises(TrainingError):
        train(tiny, "run", "epochs=2", "seed=1")


def test_a_folder_of_a_run_on_other_data_is_refused(tmp_path):
    def begun(seed):
        images, module = coloured_images(32, seed=seed), torch.nn.Linear(2, 2)
        return source_module._Run(module, images, normalization_of(images), SourceRecipe(), "linear")

    path = tmp_path / "source.pt"
    begun(0).save(path)
    with pytest.raises(TrainingError):
        begun(1).resume(path)
    body = torch.load(path)
    del body["identity"]["data"]  # as in older states
    torch.save(body, path)
    begun(1).resume(path)


@pytest.mark.parametrize(
    "text", ["", 'family = "none"\n', TINY + "stem = 3\n", TINY.replace("[1, 1]", "[1]"), "family"]
)
def test_a_file_that_describes_no_network_is_refused(tmp_path, text):
    (tmp_path / "bad.toml").write_text(text)
    for name in (str(tmp_path / "bad.toml"), str(tmp_path / "absent.toml"), "absent"):
        with pytest.raises(InvalidOptionError):
            find_source_network(name, Interface())


def test_the_small_networks_have_names_of_their_own():
    assert not SOURCES.keys() & ARCHITECTURES.keys()


def test_the_command_trains_and_says_the_accuracy(tiny):
    options = [f"--set={change}" for change in (*CHANGES, "epochs=2")]
    arguments = ("source", tiny / "tiny.toml", "--data", tiny / "data", "--out", tiny / "run", *options)
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert "of test images" in result.output
    assert (tiny / "run" / "tiny.safetensors").is_file()
    assert run(*arguments, "--set=optimizer=none").exit_code == 1
