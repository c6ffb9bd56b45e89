"""Networks by name: files, functions of scripts and modules, and timm; every wrong way ends in a sentence."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from ghn_client import GHNClient, Prediction, export_architecture
from ghn_client.cli.app import app
from ghn_client.errors import (
    ExportError,
    GhnClientError,
    InvalidArchitectureError,
    InvalidOptionError,
    MissingExtraError,
)
from ghn_client.networks import file_stem, find_network, image_example
from tests.zoo_support import import_timm

SCRIPT = """
from dataclasses import dataclass
from torch import nn
from beside_{number} import WIDTH

@dataclass
class Size:
    width: "int" = WIDTH

class Net(nn.Module):
    def __init__(self, width=Size().width):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.head = nn.Linear(width, 10)

    def forward(self, images):
        return self.head(self.conv(images).mean((2, 3)))

def make(width):
    return Net(width)

def broken():
    raise ValueError("no such width")

def text():
    return "a network"

ready = Net()
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    number = abs(hash(request.node.name))
    (tmp_path / f"beside_{number}.py").write_text("WIDTH = 5\n")
    path = tmp_path / f"networks_{number}.py"
    path.write_text(SCRIPT.format(number=number))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return path


@pytest.mark.parametrize("factory", ["Net", "ready"])
def test_a_script_finds_what_lies_beside_it(script: Path, factory: str) -> None:
    network = find_network(f"{script}:{factory}")
    assert isinstance(network, nn.Module)
    assert network.state_dict()["conv.weight"].shape[0] == 5


def test_a_module_of_the_present_folder_is_found(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(script.parent)
    assert isinstance(find_network(f"{script.stem}:Net"), nn.Module)


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("{script}", ":Size"),
        ("{script}:make", "width"),
        ("{script}:broken", "no such width"),
        ("{script}:text", "str"),
        ("{script}:Nett", "Net"),
        ("nowhere.py:make", "nowhere.py"),
        ("nowhere.py", "nowhere.py"),
        ("no.such.module:make", "no.such"),
        ("resnet18", "timm:NAME"),
    ],
)
def test_wrong_names_say_what_is_wrong(script: Path, name: str, word: str) -> None:
    with pytest.raises(InvalidOptionError) as raised:
        find_network(name.format(script=script))
    assert word in str(raised.value)


def test_a_script_that_fails_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("def make(:\n")
    with pytest.raises(InvalidOptionError):
        find_network(f"{tmp_path / 'bad.py'}:make")


def test_a_missing_file_is_said_to_be_missing() -> None:
    with pytest.raises(InvalidArchitectureError):
        find_network("missing.onnx")


def test_networks_of_timm_take_options() -> None:
    import_timm()
    network = find_network("timm:resnet10t,num_classes=7,in_chans=1")
    assert isinstance(network, nn.Module)
    assert network.state_dict()["fc.weight"].shape[0] == 7
    assert image_example(network, 64).shape == (1, 1, 64, 64)
    with pytest.raises(InvalidOptionError) as raised:
        find_network("timm:resnet81")
    assert "resnet18" in str(raised.value)
    with pytest.raises(InvalidOptionError):
        find_network("timm:resnet10t,colour=red")


def test_without_timm_the_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtraError) as raised:
        find_network("timm:resnet18")
    assert "timm" in str(raised.value)


def test_files_are_named_after_the_network(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"")
    names = (str(tmp_path / "a.onnx"), "timm:resnet18,num_classes=3", "script.py:Net", "package.module:Net")
    assert [file_stem(name) for name in names] == ["a", "resnet18", "Net", "Net"]


def test_commands_take_scripts(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(script.parent)
    result = CliRunner().invoke(app, ["predict", f"{script}:Net", "--image-size", "16", "--onnx-out", "net.onnx"])
    assert result.exit_code == 0, result.output
    network = find_network(f"{script}:Net")
    assert isinstance(network, nn.Module)
    network.load_state_dict(Prediction.load("Net.safetensors").state_dict())
    assert Path("net.onnx").is_file()
    result = CliRunner().invoke(app, ["analyze", f"{script}:Net", "--json"])
    assert {item["name"] for item in json.loads(result.stdout)["tensors"]} == set(network.state_dict())
    result = CliRunner().invoke(app, ["plan", f"{script}:Net", "--samples", "100", "--json"])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("example", [(2, 3, 16, 16), [2, 3, 16, 16], torch.Size([2, 3, 16, 16])])
def test_a_shape_is_an_example(example: object) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 14 * 14, 2))
    expected = export_architecture(module, torch.zeros(2, 3, 16, 16))
    assert export_architecture(module, example) == expected
    assert export_architecture(module, (example,)) == expected


def test_an_array_is_an_example() -> None:
    module = nn.Linear(3, 2)
    assert export_architecture(module, np.zeros((1, 3), np.float32)) == export_architecture(module, torch.zeros(1, 3))


def test_vision_models_of_transformers_need_no_example() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
    )
    module = transformers.ViTForImageClassification(config)
    assert export_architecture(module) == export_architecture(module, {"pixel_values": torch.zeros(1, 3, 16, 16)})


@pytest.mark.parametrize("name", ["script.py", "timm:nothing"])
def test_failures_of_commands_are_json(name: str) -> None:
    result = CliRunner().invoke(app, ["predict", name, "--json"])
    assert result.exit_code in {kind.exit_code for kind in (GhnClientError, InvalidOptionError)}
    assert json.loads(result.stdout)["error"]["message"]


@pytest.mark.parametrize("arguments", [["--seed", "much"], ["--no-such-option"], ["--dtype", "float8"]])
def test_command_lines_without_sense_are_json_too(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, ["predict", "model.onnx", "--json", *arguments])
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["exit_code"] == 2


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("gpu-server", "gpu-server:50051"),
        ("http://gpu-server:1", "gpu-server:1"),
        ("https://gpu-server/", "gpu-server:50051"),
        ("[::1]", "[::1]:50051"),
        ("10.0.0.1:7", "10.0.0.1:7"),
        ("unix:/tmp/socket", "unix:/tmp/socket"),
        ("dns:///gpu-server:1", "dns:///gpu-server:1"),
    ],
)
def test_addresses_are_understood(given: str, meant: str) -> None:
    assert GHNClient(given).address == meant


def test_a_closed_client_of_an_embedded_server_says_so() -> None:
    client = GHNClient.embedded()
    client.close()
    with pytest.raises(InvalidOptionError):
        client.models()


def test_decoders_are_told_to_leave_their_cache() -> None:
    class Decoder(nn.Module):
        config = type("Config", (), {"use_cache": True})()

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            raise ValueError(tokens.tolist())

    with pytest.raises(ExportError, match="use_cache"):
        export_architecture(Decoder(), torch.zeros(1, 3))
