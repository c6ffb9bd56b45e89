"""One line from a module to its start: predicted, loaded, BatchNorm measured, and said how good."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import ghn_client
import ghn_client.initialization
from ghn_architectures.registry import build_network
from ghn_client import GHNClient
from ghn_client.batchnorm import recalibrate_batchnorm
from ghn_client.errors import InvalidOptionError
from ghn_service.server.app import RunningServer

IMAGE = torch.zeros(1, 3, 16, 16)
BATCHES = [(torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(i)), torch.zeros(8)) for i in range(3)]


def network(num_classes: int = 10) -> nn.Module:
    torch.manual_seed(0)
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), *head)


@pytest.fixture(autouse=True)
def no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GHN_ADDRESS", raising=False)


def test_one_line_loads_the_prediction_and_measures_batchnorm(checkpoint: Path) -> None:
    module = network()
    report = ghn_client.initialize(module, loader=BATCHES, checkpoint=checkpoint, seed=3)
    by_hand = network()
    with GHNClient.embedded(checkpoint) as client:
        client.predict(by_hand, IMAGE, seed=3).load_into(by_hand)
    recalibrate_batchnorm(by_hand, BATCHES)
    assert all(torch.equal(value, by_hand.state_dict()[name]) for name, value in module.state_dict().items())
    assert report.loaded.trust == report.trust == report.prediction.trust
    assert report.trust.verdict in str(report)
    assert "<iframe" in report._repr_html_()


@pytest.mark.parametrize("classes", [10, 7])
def test_a_network_that_contains_a_bundled_source_starts_as_that(checkpoint: Path, classes: int) -> None:
    modules = [build_network("resnet20", num_classes=classes).eval() for _ in range(3)]
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    report = ghn_client.initialize(modules[0], loader=[images], checkpoint=checkpoint)
    named = ghn_client.initialize(modules[1], images, checkpoint=checkpoint, source="small_resnet")
    alone = ghn_client.initialize(modules[2], images, checkpoint=checkpoint, source=None)
    assert report.prediction.digest == named.prediction.digest != alone.prediction.digest
    assert report.prediction.transfer.is_exact == (classes == 10)
    assert torch.equal(modules[0](images), modules[1](images))  # the loader did not change the source's statistics
    assert (report.trust.verdict, alone.prediction.transfer) == ("typical", None)
    assert "small_resnet" in str(report)
    assert "airplane" in str(report) if classes == 10 else "airplane" not in str(report)
    assert "small_resnet" not in str(alone)


def test_what_is_near_no_source_is_left_to_the_hypernetwork(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("auto").touch()  # no network, but a file of this name
    sentences = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    for module, example in ((network(), IMAGE), (network(7), IMAGE), (sentences, torch.zeros(1, 5, dtype=torch.long))):
        by_default = ghn_client.initialize(module, example, checkpoint=checkpoint)
        alone = ghn_client.initialize(module, example, checkpoint=checkpoint, source=None)
        assert by_default.prediction.transfer is None
        assert all(torch.equal(value, alone.prediction[name]) for name, value in by_default.prediction.items())
        assert "source: none" in str(by_default)
        assert len(by_default.prediction.warnings) == len(alone.prediction.warnings) + 1


def test_a_loader_that_gives_each_batch_once_loses_none(checkpoint: Path) -> None:
    once, often = network(), network()
    ghn_client.initialize(once, loader=iter(BATCHES), checkpoint=checkpoint)
    ghn_client.initialize(often, loader=BATCHES, checkpoint=checkpoint)
    assert torch.equal(once[1].running_mean, often[1].running_mean)


def test_without_a_loader_statistics_stay_and_the_report_says_so(checkpoint: Path) -> None:
    module = network()
    report = ghn_client.initialize(module, IMAGE, checkpoint=checkpoint)
    assert torch.equal(module[1].running_mean, torch.zeros(8))
    assert "loader=" in report.batchnorm


def test_the_address_may_come_from_the_environment(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GHN_ADDRESS", server.address)
    assert ghn_client.initialize(network(), IMAGE).address == server.address


def test_a_client_may_be_given_and_stays_open(client: GHNClient) -> None:
    report = ghn_client.initialize(network(), IMAGE, client=client, include=["0.*", "1.*", "5.*"], dtype="bfloat16")
    assert report.prediction.metadata.dtype == "bfloat16"
    assert client.health().alive


@pytest.mark.parametrize(
    "arguments",
    [
        {"address": "a:1", "checkpoint": "b"},
        {"loader": []},
        {"loader": iter(())},
        {"example_inputs": IMAGE, "loader": []},
    ],
    ids=["two servers", "no batch", "no batch left", "no batch beside an example"],
)
def test_bad_arguments_leave_the_module_alone(arguments: dict) -> None:
    module = network()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(InvalidOptionError):
        ghn_client.initialize(module, **arguments)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_classifier_for_other_classes_is_drawn_anew_unless_rows_are_wanted(checkpoint: Path) -> None:
    def origins(classes: int, **options: str) -> set[str]:
        prediction = ghn_client.initialize(network(classes), IMAGE, checkpoint=checkpoint, **options).prediction
        return {prediction.origins["5.weight"], prediction.origins["5.bias"]}

    assert origins(7) == origins(20) == origins(10, head="reset") == {"fallback:classifier", "fallback:classifier_bias"}
    assert origins(20, head="predicted") == {"tiled"}
    assert origins(10) == origins(7, head="predicted") == {"predicted"}
    with pytest.raises(InvalidOptionError):
        origins(7, head="other")
    with ghn_client.GHNClient.embedded(checkpoint) as client:  # an analysis says what a prediction would do
        for head, wanted in {
            "auto": "fallback:classifier",
            "predicted": "predicted",
            "reset": "fallback:classifier",
        }.items():
            analysis = client.analyze(network(7), IMAGE, head=head)
            assert {item.origin for item in analysis.tensors if item.name == "5.weight"} == {wanted}
            assert (analysis.trust.shares["fallback"] > 0) == (wanted != "predicted")
