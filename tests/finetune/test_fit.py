"""The training loop: it learns, stops early, resumes exactly, and ends with the best values."""

from __future__ import annotations

from pathlib import PurePosixPath

import pytest
import torch

from ghn_client.errors import FileError, InvalidOptionError
from ghn_client.finetune.fit import FitSettings, evaluate, fit
from ghn_client.finetune.norm_only import norm_only
from ghn_client.finetune.strategies import STRATEGIES, prepare
from tests.finetune.networks import ResidualNetwork, small_cnn


def data(count=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count,), generator=generator)
    patterns = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(9))
    images = patterns[labels] + 0.3 * torch.randn(count, 3, 8, 8, generator=generator)
    return [(images[i : i + 16], labels[i : i + 16]) for i in range(0, count, 16)]


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name not in ("head_only", "bias_only")])
def test_every_strategy_learns(strategy):
    options = {"width": 16} if strategy == "additive" else {}
    handle = prepare(small_cnn(), strategy, **options)
    report = fit(handle, data(), settings=FitSettings(epochs=8, learning_rate=0.1), validation=data(seed=1))
    assert report.epochs[-1].train_loss < report.epochs[0].train_loss
    assert report.accuracy == max(epoch.accuracy for epoch in report.epochs)
    assert not handle.module.training


def test_the_module_ends_with_the_best_epoch():
    handle = norm_only(ResidualNetwork(8))
    report = fit(handle, data(), settings=FitSettings(epochs=6, learning_rate=0.3), validation=data(seed=1))
    assert evaluate(handle.module, data(seed=1))[0] == report.accuracy


def test_early_stopping():
    handle = norm_only(ResidualNetwork(8))
    report = fit(
        handle, data(), settings=FitSettings(epochs=50, learning_rate=1e-9, patience=2), validation=data(seed=1)
    )
    assert report.stopped_early
    assert len(report.epochs) == 3


class Shuffled(list):
    """Batches in an order that a generator of their own draws, as ``ImageBatches`` and ``DataLoader`` have them."""

    def __init__(self, batches):
        super().__init__(batches)
        self.generator = torch.Generator().manual_seed(0)

    def __iter__(self):
        return (self[index] for index in torch.randperm(len(self), generator=self.generator).tolist())


@pytest.mark.parametrize("order", [list, Shuffled])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, order):
    settings = FitSettings(epochs=4, learning_rate=0.1)
    whole = norm_only(ResidualNetwork(8))
    fit(whole, order(data()), settings=settings)

    class InterruptionError(Exception):
        pass

    def interrupt(report):
        if report.epoch == 2:
            raise InterruptionError

    first = norm_only(ResidualNetwork(8))
    with pytest.raises(InterruptionError):
        fit(first, order(data()), settings=settings, checkpoint=tmp_path / "run.pt", on_epoch=interrupt)
    second = norm_only(ResidualNetwork(8))
    report = fit(second, order(data()), settings=settings, checkpoint=tmp_path / "run.pt")
    assert [epoch.epoch for epoch in report.epochs] == [1, 2, 3, 4]
    inputs = data()[0][0]
    assert torch.equal(second.module(inputs), whole.module(inputs))


@pytest.mark.parametrize(
    "other",
    [
        lambda: prepare(ResidualNetwork(8), "all"),
        lambda: norm_only(ResidualNetwork(6)),
        lambda: norm_only(ResidualNetwork(8, classes=5), head=False),
        lambda: norm_only(ResidualNetwork(8, seed=1)),
    ],
    ids=["strategy", "shapes", "names", "base"],
)
def test_a_checkpoint_of_another_run_is_refused_and_changes_nothing(tmp_path, other):
    settings = FitSettings(epochs=1)
    fit(norm_only(ResidualNetwork(8)), data(), settings=settings, checkpoint=tmp_path / "run.pt")
    handle = other()
    before = {name: value.clone() for name, value in handle.module.state_dict().items()}
    with pytest.raises(FileError):
        fit(handle, data(), settings=settings, checkpoint=tmp_path / "run.pt")
    assert all(torch.equal(before[name], value) for name, value in handle.module.state_dict().items())


def test_a_checkpoint_without_a_tensor_is_refused_and_changes_nothing(tmp_path):
    path, settings = tmp_path / "run.pt", FitSettings(epochs=1)
    fit(norm_only(ResidualNetwork(8)), data(), settings=settings, checkpoint=path)
    document = torch.load(path, weights_only=True)
    document["best_state"].popitem()
    torch.save(document, path)
    handle = norm_only(ResidualNetwork(8))
    before = {name: value.clone() for name, value in handle.state().items()}
    with pytest.raises(FileError):
        fit(handle, data(), settings=settings, checkpoint=path)
    assert all(torch.equal(before[name], value) for name, value in handle.state().items())


def test_frobenius_decay_shrinks_the_product():
    norms = []
    for decay in (0.0, 0.5):
        network = small_cnn()
        handle = prepare(network, "low_rank", frobenius_decay=decay)
        fit(handle, data(), settings=FitSettings(epochs=3, learning_rate=0.05))
        norms.append(float(network[7].dense_weight().norm()))
    assert norms[1] < 0.9 * norms[0]


@pytest.mark.parametrize("options", [{"epochs": 0}, {"optimizer": "lion"}, {"learning_rate": 0.0}, {"patience": 0}])
def test_settings_are_checked(options):
    with pytest.raises(InvalidOptionError):
        FitSettings(**options)


def test_no_data_is_refused():
    with pytest.raises(InvalidOptionError):
        fit(norm_only(ResidualNetwork(8)), [])
    with pytest.raises(InvalidOptionError):
        evaluate(ResidualNetwork(8), [])


@pytest.mark.parametrize("content", [{"anything": PurePosixPath("a")}, [1]], ids=["pickled code", "list"])
def test_a_broken_checkpoint_is_an_error_of_ours(tmp_path, content):
    torch.save(content, tmp_path / "run.pt")
    with pytest.raises(FileError) as caught:
        fit(norm_only(ResidualNetwork(8)), data(), settings=FitSettings(epochs=1), checkpoint=tmp_path / "run.pt")
    assert "weights_only" not in str(caught.value)
