"""Statistics of training architectures in a checkpoint's card."""

from __future__ import annotations

import pytest

from ghn_service.errors import TrainingError
from ghn_service.hypernetwork.checkpoint import ModelCard, load_checkpoint, save_checkpoint
from ghn_service.postprocess.distribution_shift import decode_statistics, measure_shift
from ghn_service.predictor import Predictor
from ghn_service.training.graph_statistics import add_graph_statistics, training_graph_statistics
from ghn_service.training.networks import Pool, Task
from ghn_service.training.settings import TrainingSettings
from tests.hypernetwork.small_graphs import small_ghn

TASK = Task(10, 3, 32)


def test_training_networks_are_typical_of_themselves() -> None:
    settings, source = TrainingSettings().sampling, Pool("train", TASK, 1000)
    known = decode_statistics(training_graph_statistics(source, settings, num_graphs=30))
    assert known.num_graphs == 30
    shift = measure_shift(source(3).graph(), known)
    assert shift.verdict in ("typical", "unusual")


def test_a_checkpoint_gets_its_statistics_afterwards(tmp_path) -> None:
    ghn, path = small_ghn(), tmp_path / "ghn.safetensors"
    details = {"settings": TrainingSettings().model_dump(mode="json"), "channels": 3, "image_size": 32}
    save_checkpoint(ghn, path, card=ModelCard(details=details))
    add_graph_statistics(path, num_graphs=10)
    predictor = Predictor(*load_checkpoint(path))
    assert predictor.graph_statistics is not None


def test_a_checkpoint_of_unknown_origin_is_refused(tmp_path) -> None:
    save_checkpoint(small_ghn(), tmp_path / "ghn.safetensors")
    with pytest.raises(TrainingError):
        add_graph_statistics(tmp_path / "ghn.safetensors")
