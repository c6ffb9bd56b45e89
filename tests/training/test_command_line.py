"""``ghn-train`` as a user runs it: other class counts, sizes and gray images, settings, errors in one line."""

from __future__ import annotations

import sys

import pytest
from typer.testing import CliRunner

from ghn_service.errors import InvalidOptionError
from ghn_service.hypernetwork.checkpoint import load_checkpoint
from ghn_service.training.__main__ import app
from ghn_service.training.settings import load_settings
from tests.training.written_images import write_idx_files, write_image_folder

TINY = [
    "--set=hypernetwork={hidden_channels=8, num_heads=2, num_layers=1, max_shape=[8,8,7,7]}",
    "--set=data.batch_size=4",
    "--set=sampling.largest_macs=2e6",
    "--set=sampling.start_macs=2e6",
    "--set=sampling.pool=20",
    "--set=limits.validation_networks=1",
    "--set=limits.steps=2",
    "--set=limits.log_every=1",
]


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize(("classes", "channels", "size"), [(3, 1, 20), (5, 3, 16)])
def test_fit_takes_any_classes_channels_and_size(tmp_path, classes, channels, size):
    write_image_folder(tmp_path / "data", classes=classes, channels=channels, size=size, count=40)
    result = run("fit", "--data", tmp_path / "data", "--out", tmp_path / "run", *TINY)
    assert result.exit_code == 0, result.output
    hypernetwork, summary = load_checkpoint(tmp_path / "run" / "ghn.safetensors")
    assert hypernetwork.config.num_classes == classes
    assert summary.card.details["image_size"] == size
    assert summary.card.details["channels"] == channels


def test_gray_idx_files_are_trained_on_and_evaluated(tmp_path):
    write_idx_files(tmp_path / "data", classes=3)
    result = run("fit", "--data", tmp_path / "data", "--out", tmp_path / "run", *TINY)
    assert result.exit_code == 0, result.output
    checkpoint = tmp_path / "run" / "ghn.safetensors"
    assert load_checkpoint(checkpoint)[1].card.details["image_size"] == 28
    options = ("--splits", "test=1", "--fine-tune", 0, "--novelty-networks", 0, "--workers", 1, "--out", tmp_path)
    result = run("evaluate", "--checkpoint", checkpoint, "--data", tmp_path / "data", *options)
    assert result.exit_code == 0, result.output
    assert "| test | 1 |" in (tmp_path / "evaluation.md").read_text()


def test_fit_goes_on_with_a_run(tmp_path):
    write_image_folder(tmp_path / "data", classes=3)
    command = ("fit", "--data", tmp_path / "data", "--out", tmp_path / "run", *TINY)
    assert run(*command).exit_code == 0
    again = run(*command, "--set=limits.steps=3")
    assert "3 networks in 3 steps" in again.output
    assert run(*command, "--resume", "never").exit_code == 1


def test_a_run_may_start_from_a_checkpoint_or_another_run(tmp_path):
    write_image_folder(tmp_path / "data", classes=3)
    command = ("fit", "--data", tmp_path / "data", *TINY)
    assert run(*command, "--out", tmp_path / "one").exit_code == 0
    for name, change in (
        ("ghn.safetensors", "seed=1"),
        ("state.pt", "seed=1"),
        ("state.pt", "hypernetwork.places=true"),
    ):
        out = ("--out", tmp_path / f"from {name} {change}", "--set", change)
        result = run(*command, *out, "--start-from", tmp_path / "one" / name)
        assert result.exit_code == 0, result.output


def test_evaluate_writes_its_report(tmp_path):
    write_image_folder(tmp_path / "data", classes=3)
    run("fit", "--data", tmp_path / "data", "--out", tmp_path / "run", *TINY)
    options = ("--splits", "test=1,wide", "--networks", 0, "--fine-tune", 0, "--novelty-networks", 1, "--workers", 1)
    checkpoint = tmp_path / "run" / "ghn.safetensors"
    result = run("evaluate", "--checkpoint", checkpoint, "--data", tmp_path / "data", "--out", tmp_path, *options)
    assert result.exit_code == 0, result.output
    assert "| test | 1 |" in (tmp_path / "evaluation.md").read_text()
    assert (tmp_path / "measurements.jsonl").is_file()


@pytest.mark.parametrize("library", ["PIL", "torch.utils.tensorboard"])
def test_a_missing_library_is_one_sentence_that_says_how_to_get_it(tmp_path, monkeypatch, library):
    write_image_folder(tmp_path / "data", classes=3)
    monkeypatch.setitem(sys.modules, library, None)
    result = run("fit", "--data", tmp_path / "data", "--out", tmp_path / "run", *TINY)
    assert result.exit_code == 1
    assert "pip install " in result.output.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments",
    [
        ("fit", "--data", "nowhere", "--out", "run"),
        ("evaluate", "--checkpoint", "nowhere.safetensors", "--data", "nowhere"),
        ("fit", "--data", ".", "--out", "run", "--set", "optimizer.learning_rate=-1"),
        ("evaluate", "--checkpoint", "x.safetensors", "--data", ".", "--splits", "training"),
        ("evaluate", "--checkpoint", "x.safetensors", "--data", ".", "--splits", "test=many"),
    ],
)
def test_errors_are_one_line_and_status_1(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 1
    assert not isinstance(result.exception, Exception) or isinstance(result.exception, SystemExit)


def test_settings_come_from_a_file_and_changes_win(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text("seed = 3\n[optimizer]\nlearning_rate = 0.5\nclip = 2.0\n")
    settings = load_settings(path, ["optimizer.learning_rate=0.25", "optimizer.name=muon"])
    assert (settings.seed, settings.optimizer.learning_rate, settings.optimizer.clip) == (3, 0.25, 2.0)
    assert settings.optimizer.name == "muon"


@pytest.mark.parametrize("change", ["optimizer.speed=1", "data.batch_size=one", "nonsense", "hypernetwork.rank=0"])
def test_impossible_settings_are_named(change):
    with pytest.raises(InvalidOptionError):
        load_settings(None, [change])


def test_limits_do_not_change_the_digest():
    base = load_settings(None)
    assert load_settings(None, ["limits.steps=5"]).digest() == base.digest()
    assert load_settings(None, ["optimizer.clip=1.5"]).digest() != base.digest()
