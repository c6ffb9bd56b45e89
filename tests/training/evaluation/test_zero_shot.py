"""Both zero-shot protocols, the He baseline, and validation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ghn_service.hypernetwork.ghn import GHNConfig, GraphHyperNetwork
from ghn_service.training.evaluation import zero_shot
from ghn_service.training.evaluation.zero_shot import (
    batch_accuracy,
    he_module,
    make_validation,
    predict_module,
    recalibrated_accuracy,
)
from tests.training.made_images import coloured_images, normalization_of
from tests.training.training_cases import small_source

CONFIG = GHNConfig(hidden_channels=8, num_heads=2, num_layers=1, max_shape=(8, 8, 5, 5), num_classes=4)


@pytest.fixture
def hypernetwork():
    return GraphHyperNetwork(CONFIG, generator=torch.Generator().manual_seed(0)).eval()


def test_a_predicted_module_has_the_predicted_weights(hypernetwork):
    one = predict_module(hypernetwork, small_source(1), seed=0)
    other = predict_module(hypernetwork, small_source(1), seed=9)
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_he_weights_have_the_variance_of_the_paper():
    module = he_module(small_source(3), seed=0)
    weight = module.convolutions[1].weight.detach()
    assert weight.var().item() == pytest.approx(2.0 / weight[0].numel(), rel=0.2)


def test_he_modules_differ_by_seed_alone():
    first, again, other = (he_module(small_source(1), seed=seed).head.weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_batch_statistics_leave_the_module_alone():
    images = coloured_images(130)
    module = he_module(small_source(2), seed=0)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    batch_accuracy(module, images, normalization_of(images))
    recalibrated_accuracy(module, images, images, normalization_of(images))
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(layer.track_running_stats for layer in module.modules() if isinstance(layer, nn.BatchNorm2d))


def test_batch_accuracy_does_not_use_running_statistics():
    images = coloured_images(64)
    module = he_module(small_source(2), seed=0)
    before = batch_accuracy(module, images, normalization_of(images))
    for layer in module.norms:
        layer.running_mean.fill_(1e6)
    assert batch_accuracy(module, images, normalization_of(images)) == before


def test_recalibration_keeps_dropout_off():
    images = coloured_images(64)
    normalization = normalization_of(images)
    module = nn.Sequential(nn.Dropout(0.5), he_module(small_source(2), seed=0))
    scores = {recalibrated_accuracy(module, images, images, normalization) for _ in range(3)}
    assert scores == {recalibrated_accuracy(module[1], images, images, normalization)}


def test_validation_gives_mean_best_and_worst(hypernetwork):
    images = coloured_images(64)
    scores = make_validation(small_source, range(3), images, normalization_of(images))(hypernetwork)
    assert scores["worst"] <= scores["accuracy"] <= scores["best"]


@pytest.mark.parametrize(("reached", "is_warned"), [(0.3, True), (0.9, False)])
def test_validation_warns_where_little_but_the_largest_class_was_learnt(
    hypernetwork, monkeypatch, caplog, reached, is_warned
):
    images = coloured_images(64)
    largest = float(images.labels.bincount().max()) / 64
    monkeypatch.setattr(zero_shot, "batch_accuracy", lambda *_: reached)
    scores = make_validation(small_source, range(3), images, normalization_of(images))(hypernetwork)
    assert (scores["accuracy"], scores["largest_class"]) == (pytest.approx(reached), largest)
    assert bool(caplog.records) == is_warned == (reached < largest + zero_shot.NOTHING_LEARNT)
