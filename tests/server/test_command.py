"""The command ``ghn-server``: what it prints, and how it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ghn_service.__main__ import app
from ghn_service.hypernetwork.checkpoint import load_checkpoint, save_checkpoint
from ghn_service.server.settings import Settings
from tests.hypernetwork.small_graphs import small_ghn
from tests.shared_data import shared_path

runner = CliRunner()


def test_version() -> None:
    result = runner.invoke(app, ["--version"])
    assert (result.exit_code, result.stdout.split()[0]) == (0, "ghn-server")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "small.safetensors"
    save_checkpoint(small_ghn(), path)
    return path


def test_show_checkpoint_is_json(checkpoint: Path) -> None:
    result = runner.invoke(app, ["show-checkpoint", str(checkpoint)])
    document = json.loads(result.stdout)
    assert result.exit_code == 0
    assert document["digest"] == load_checkpoint(checkpoint)[1].digest
    assert document["config"]["hidden_channels"] == small_ghn().config.hidden_channels


def test_import_checkpoint_writes_one_of_ours(tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    source = shared_path("golden/ghn3_seeded.safetensors")
    result = runner.invoke(app, ["import-checkpoint", str(source), "--output", str(output)])
    assert result.exit_code == 0
    assert load_checkpoint(output)[1].digest in result.stdout


def test_every_setting_is_a_flag_with_its_help() -> None:
    result = runner.invoke(app, ["serve", "--help"])
    assert result.exit_code == 0
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in result.stdout
        assert field.description, name
    assert "--checkpoint " in result.stdout
    assert "--no-reflection" in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["show-checkpoint", "none.safetensors"],
        ["import-checkpoint", "none.pt", "--output", "out.safetensors"],
        ["serve", "--checkpoint", "none.safetensors"],
        ["serve", "--config", "none.toml"],
        ["serve", "--port", "99999"],
        ["serve", "--prot", "1"],
        ["serve", "--max-queue"],
        ["serve", "--log-format", "xml"],
        ["serve", "--checkpoint", "broken.safetensors", "--port", "0"],
        ["serve", "--checkpoint", "broken.safetensors", "--device", "cuda:77", "--port", "0"],
    ],
)
def test_a_refusal_is_one_line_and_status_1(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ghn_service.server.logging.configure_logging", lambda log_format, level: None)
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    Path("broken.safetensors").write_bytes(b"nonsense")
    result = runner.invoke(app, arguments)
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("ghn-server: ")
