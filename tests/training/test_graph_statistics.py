"""Statistics of training architectures in a checkpoint's card."""

from __future__ import annotations

from ghn_service.postprocess.distribution_shift import decode_statistics, measure_shift
from ghn_service.training.graph_statistics import training_graph_statistics
from ghn_service.training.networks import Pool, Task
from ghn_service.training.settings import TrainingSettings

TASK = Task(10, 3, 32)


def test_training_networks_are_typical_of_themselves() -> None:
    settings, source = TrainingSettings().sampling, Pool("train", TASK, 1000)
    known = decode_statistics(training_graph_statistics(source, settings, num_graphs=30))
    assert known.num_graphs == 30
    shift = measure_shift(source(3).graph(), known)
    assert shift.verdict in ("typical", "unusual")
