"""The server inside the process: the real one, started and stopped with the client."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ghn_client import GHNClient
from ghn_client.errors import EmbeddedServerError
from ghn_service.server import settings
from tests.clients.small_modules import IMAGE, ConvNet


@pytest.fixture
def no_bundled_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "BUNDLED_CHECKPOINTS", tmp_path)
    monkeypatch.delenv("GHN_CHECKPOINTS", raising=False)


def test_a_module_is_predicted_by_the_real_server(checkpoint: Path) -> None:
    module = ConvNet()
    with GHNClient.embedded(checkpoint) as client:
        prediction = client.predict(module, IMAGE)
        assert client.models()[0].name == "small"
    assert prediction.load_into(module).is_complete
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())


def test_it_stops_with_the_client(checkpoint: Path) -> None:
    with GHNClient.embedded(checkpoint) as client:
        host, _, port = client.address.rpartition(":")
        socket.create_connection((host, int(port)), timeout=5).close()
    with pytest.raises(OSError):
        socket.create_connection((host, int(port)), timeout=5)


def test_it_listens_on_this_machine_only(checkpoint: Path) -> None:
    with GHNClient.embedded(checkpoint) as client:
        assert client.address.startswith("127.0.0.1:")


@pytest.mark.usefixtures("no_bundled_checkpoint")
def test_it_refuses_without_a_trained_checkpoint() -> None:
    with pytest.raises(EmbeddedServerError):
        GHNClient.embedded()


def test_a_missing_checkpoint_is_an_error_of_the_embedded_server(tmp_path: Path) -> None:
    with pytest.raises(EmbeddedServerError):
        GHNClient.embedded(tmp_path / "nothing.safetensors")


def test_a_damaged_checkpoint_is_an_error_of_the_embedded_server(tmp_path: Path) -> None:
    (tmp_path / "damaged.safetensors").write_bytes(b"damaged")
    with pytest.raises(EmbeddedServerError):
        GHNClient.embedded(tmp_path / "damaged.safetensors")


def test_the_command_line_predicts_without_an_address(checkpoint: Path, tmp_path: Path) -> None:
    from ghn_client import export_architecture

    (tmp_path / "model.onnx").write_bytes(export_architecture(ConvNet(), IMAGE))
    command = [sys.executable, "-m", "ghn_client", "predict", "model.onnx", "--checkpoint", str(checkpoint)]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "conv1" in finished.stdout
    assert finished.stderr == ""
    assert (tmp_path / "model.safetensors").exists()
