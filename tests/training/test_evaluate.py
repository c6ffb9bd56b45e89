"""``evaluate`` from a checkpoint file and a data folder to the report, over the generator's networks."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from ghn_service.errors import DataError
from ghn_service.hypernetwork.checkpoint import ModelCard, save_checkpoint
from ghn_service.hypernetwork.ghn import GHNConfig, GraphHyperNetwork
from ghn_service.training.evaluate import EvaluationPlan, evaluate
from ghn_service.training.fine_tune import FineTunePlan
from ghn_service.training.novelty import PredictionLibrary
from tests.training.training_cases import small_source
from tests.training.written_images import write_image_folder

CONFIG = GHNConfig(hidden_channels=8, num_heads=2, num_layers=1, max_shape=(8, 8, 7, 7), num_classes=4)
PLAN = EvaluationPlan(
    splits=("test",),
    networks=2,
    test_images=64,
    calibration_images=64,
    fine_tune_networks=1,
    fine_tune_images=(0, 16),
    fine_tune_test_images=64,
    validation_images=16,
    fine_tune=FineTunePlan(learning_rates=(0.01, 0.1), choose_at=2, budgets=(2,), longest=4, every=2, batch_size=8),
    library=2,
    precision="float32",
)


@pytest.fixture
def files(tmp_path):
    hypernetwork = GraphHyperNetwork(CONFIG, generator=torch.Generator().manual_seed(0))
    save_checkpoint(hypernetwork, tmp_path / "ghn.safetensors", card=ModelCard(dataset="made up"))
    write_image_folder(tmp_path / "data", classes=4)
    return tmp_path / "ghn.safetensors", tmp_path / "data"


def comparable(evaluation):
    """Values of an evaluation without its time; NaN made equal to itself."""
    return repr(dataclasses.replace(evaluation, seconds=0.0))


def test_the_number_of_processes_changes_nothing(files):
    one = evaluate(*files, PLAN, workers=1)
    assert [item.name for item in one.zero_shot] == ["0", "1"]
    assert all(math.isfinite(item.copied) for item in one.zero_shot)
    assert {item.images for item in one.fine_tuned} == {0, 16}
    two = evaluate(*files, PLAN, workers=2)
    assert comparable(one) == comparable(two)


def test_another_class_count_is_an_error(tmp_path, files):
    write_image_folder(tmp_path / "other", classes=3)
    with pytest.raises(DataError):
        evaluate(files[0], tmp_path / "other", PLAN)


def alike(network):
    """Another network of the same width and kernel."""
    candidates = (small_source(index) for index in range(3, 5000))
    return next(
        item
        for item in candidates
        if (item.width, item.kernel) == (network.width, network.kernel) and item.depth != network.depth
    )


def test_a_training_network_is_its_own_neighbour():
    hypernetwork = GraphHyperNetwork(CONFIG, generator=torch.Generator().manual_seed(0))
    library = PredictionLibrary(hypernetwork, [small_source(2)])
    own = library.novelty(small_source(2))
    assert own.distance == 0.0
    assert own.covered == 1.0
    assert library.novelty(alike(small_source(2))).distance > 0.0
