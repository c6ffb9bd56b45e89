"""Sources of a server's library: how they get there, how they are listed, and how they are asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from ghn_client import GHNClient, Prediction, export_architecture
from ghn_client.cli.app import app as client_app
from ghn_client.errors import InvalidOptionError, SourceError, UnknownModelError
from ghn_service.__main__ import app as server_app
from ghn_service.errors import UnknownModelError as ServiceUnknownModelError
from ghn_service.hypernetwork.checkpoint import save_checkpoint
from ghn_service.server.app import RunningServer, start_server
from ghn_service.server.settings import Settings
from ghn_service.transfer.library import save_source
from ghn_service.transfer.source import SourceCard
from tests.hypernetwork.small_graphs import small_ghn
from tests.transfer.networks import EXAMPLE, Residual, images, trained
from tests.transfer.test_sources import save_onnx

CARD = SourceCard(dataset="noise", class_names=tuple("abcdefghij"), accuracy=0.125, licence="MIT")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("library")
    (path / "sources").mkdir()
    save_checkpoint(small_ghn(), path / "small.safetensors")
    structure = export_architecture(trained(), EXAMPLE)
    save_source(path / "sources" / "narrow.safetensors", structure, trained().state_dict(), card=CARD)
    (path / "target.onnx").write_bytes(export_architecture(Residual(width=12), EXAMPLE))
    return path


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[RunningServer]:
    settings = Settings(port=0, checkpoints=(str(folder / "small.safetensors"),), sources=(str(folder / "sources"),))
    with start_server(settings) as running:
        running.wait_ready(60)
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[GHNClient]:
    with GHNClient(server.address) as connected:
        yield connected


def run(app, *arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_server_lists_its_sources(client: GHNClient, folder: Path) -> None:
    source = next(item for item in client.sources() if item.name == "narrow")
    assert (source.dataset, source.class_names, source.accuracy) == ("noise", CARD.class_names, 0.125)
    assert (source.licence, source.card["image_size"]) == ("MIT", 0)
    assert source.num_parameters == sum(value.numel() for value in trained().state_dict().values() if value.dim())


def test_a_source_is_asked_for_by_name(client: GHNClient) -> None:
    target = Residual(width=12)
    prediction = client.predict(target, EXAMPLE, source="narrow")
    assert prediction.origins["conv1.weight"] == "source:narrow (grown)"
    assert prediction.verify(trained(), target, images()) < 1e-4
    assert prediction.transfer is not None
    assert prediction.transfer.source.digest == next(x.digest for x in client.sources() if x.name == "narrow")


def test_auto_finds_what_the_architecture_contains(client: GHNClient) -> None:
    prediction = client.predict(Residual(width=12, depth=3), EXAMPLE, source="auto")
    assert prediction.transfer is not None
    assert prediction.transfer.source.name == "narrow"


def test_auto_leaves_strangers_to_the_hypernetwork(client: GHNClient) -> None:
    target = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 7), torch.nn.ReLU(), torch.nn.Linear(7, 3))
    prediction = client.predict(target, (1, 3, 2, 2), source="auto")
    assert prediction.transfer is None
    assert not any(origin.startswith("source") for origin in prediction.origins.values())
    assert prediction.warnings
    analysis = client.analyze(target, (1, 3, 2, 2), source="auto")
    assert (analysis.transfer, analysis.warnings) == (None, prediction.warnings)


def test_weights_of_this_machine_are_not_sent(client: GHNClient, folder: Path) -> None:
    for source in (trained(), save_onnx(trained(), folder / "trained.onnx"), folder / "sources" / "narrow.safetensors"):
        with pytest.raises(InvalidOptionError) as caught:
            client.predict(Residual(), EXAMPLE, source=source)
        assert caught.value.field == "source"


@pytest.mark.parametrize("name", ["nothing", "../narrow", "lent:0"])
def test_unknown_names_are_told(server: RunningServer, client: GHNClient, name: str) -> None:
    if ":" not in name:
        with pytest.raises(UnknownModelError):
            client.predict(Residual(), EXAMPLE, source=name)
    with pytest.raises(ServiceUnknownModelError):
        server.sources.load(name)


def test_strangers_are_refused(client: GHNClient) -> None:
    with pytest.raises(SourceError):
        client.predict(torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3)), (1, 5), source="narrow")


# ---- commands --------------------------------------------------------------------------------------------------------


def test_an_operator_adds_sources(folder: Path, tmp_path: Path) -> None:
    path = save_onnx(trained(), tmp_path / "mine.onnx")
    told = ["--dataset", "noise", "--licence", "MIT", "--class-name", "a", "--accuracy", "0.5"]
    result = run(server_app, "add-source", path, "--to", tmp_path, "--half", *told)
    assert result.exit_code == 0, result.output
    again = run(server_app, "add-source", tmp_path / "mine.safetensors", "--to", tmp_path, "--name", "copy")
    assert again.exit_code == 0, again.output
    with GHNClient.embedded(folder / "small.safetensors") as client:
        prediction = client.predict(Residual(), EXAMPLE, source=tmp_path / "copy.safetensors")
    assert prediction.transfer is not None
    assert prediction.transfer.is_exact
    assert (prediction.transfer.source.licence, prediction.transfer.source.class_names) == ("MIT", ("a",))
    assert torch.equal(prediction["conv1.weight"], trained().conv1.weight.detach().half().float())


@pytest.mark.parametrize("kind", ["missing", "no folder", "no weights", "name for two"])
def test_an_operator_is_told_what_is_no_source(folder: Path, tmp_path: Path, kind: str) -> None:
    arguments: list[str | Path] = {
        "missing": [tmp_path / "nothing.onnx", "--to", tmp_path],
        "no folder": [folder / "target.onnx", "--to", tmp_path / "nothing"],
        "no weights": [folder / "target.onnx", "--to", tmp_path],
        "name for two": [folder / "target.onnx", folder / "target.onnx", "--to", tmp_path, "--name", "x"],
    }[kind]
    assert run(server_app, "add-source", *arguments).exit_code == 1
    assert not list(tmp_path.iterdir())


def test_commands_predict_from_a_source(server: RunningServer, folder: Path, tmp_path: Path) -> None:
    where = ["--address", server.address, "--source", "narrow", "--json"]
    dry = run(client_app, "analyze", folder / "target.onnx", *where)
    assert dry.exit_code == 0, dry.output
    result = run(client_app, "predict", folder / "target.onnx", "-o", tmp_path / "w.safetensors", *where)
    assert result.exit_code == 0, result.output
    document, analysis = json.loads(result.stdout), json.loads(dry.stdout)
    assert document["transfer"] == analysis["transfer"]
    assert document["transfer"]["is_exact"]
    assert not document["needs_recalibration"]
    assert document["bytes"] == analysis["total_bytes"]
    loaded = Prediction.load(tmp_path / "w.safetensors")
    assert list(loaded.statistics) == document["statistics"]
    target = Residual(width=12)
    loaded.load_into(target)
    torch.testing.assert_close(target.eval()(images()), trained()(images()), rtol=1e-4, atol=1e-4)


def test_tables_name_the_source(server: RunningServer, folder: Path, tmp_path: Path) -> None:
    listed = run(client_app, "models", "--address", server.address)
    assert all(word in listed.stdout for word in ("narrow", "MIT", "noise", "12.5%"))
    where = ["--address", server.address, "--source", "narrow", "--class-layer", "reset"]
    shown = run(client_app, "predict", folder / "target.onnx", "-o", tmp_path / "w.safetensors", *where)
    assert shown.exit_code == 0, shown.output
    assert all(word in shown.stdout for word in ("source:narrow (grown)", "predicted", "MIT"))


def test_weights_without_a_network_are_refused(server: RunningServer, folder: Path) -> None:
    where = ["--address", server.address, "--source-weights", "w.pt"]
    assert run(client_app, "predict", folder / "target.onnx", *where).exit_code == 2


def test_a_missing_folder_ends_the_server(tmp_path: Path) -> None:
    result = run(server_app, "serve", "--sources", tmp_path / "nothing")
    assert result.exit_code == 1
