"""The training loop: it learns, stops early, resumes exactly, and ends with the best values."""

from __future__ import annotations

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


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    settings = FitSettings(epochs=4, learning_rate=0.1)
    whole = norm_only(ResidualNetwork(8))
    fit(whole, data(), settings=settings)

    class InterruptionError(Exception):
        pass

    def interrupt(report):
        if report.epoch == 2:
            raise InterruptionError

    first = norm_only(ResidualNetwork(8))
    with pytest.raises(InterruptionError):
        fit(first, data(), settings=settings, checkpoint=tmp_path / "run.pt", on_epoch=interrupt)
    second = norm_only(ResidualNetwork(8))
    report = fit(second, data(), settings=settings, checkpoint=tmp_path / "run.pt")
    assert [epoch.epoch for epoch in report.epochs] == [1, 2, 3, 4]
    inputs = data()[0][0]
    assert torch.equal(second.module(inputs), whole.module(inputs))


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    fit(norm_only(ResidualNetwork(8)), data(), settings=FitSettings(epochs=1), checkpoint=tmp_path / "run.pt")
    with pytest.raises(FileError):
        fit(prepare(ResidualNetwork(8), "all"), data(), settings=FitSettings(epochs=1), checkpoint=tmp_path / "run.pt")


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


def test_a_broken_checkpoint_is_an_error_of_ours(tmp_path):
    torch.save({"anything": tmp_path}, tmp_path / "run.pt")
    with pytest.raises(FileError) as caught:
        fit(norm_only(ResidualNetwork(8)), data(), settings=FitSettings(epochs=1), checkpoint=tmp_path / "run.pt")
    assert "weights_only" not in str(caught.value)
