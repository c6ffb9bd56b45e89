"""Statistics of training architectures in a checkpoint's card."""

from __future__ import annotations

from ghn_architectures.architecture import Interface
from ghn_service.training.networks import Pool
from ghn_service.training.run import graph_statistics
from ghn_service.training.settings import TrainingSettings
from ghn_service.trust import KnownData, decode_statistics, judge


def test_training_networks_are_typical_of_themselves() -> None:
    settings, source = TrainingSettings().sampling, Pool("train", Interface(), 1000)
    known = decode_statistics(graph_statistics(source, settings, num_graphs=30))
    assert known.num_graphs == 30
    graph = source(3).graph()
    origins = {spec.name: "predicted" for spec in graph.parameters()}
    assert judge(graph, origins, {}, KnownData(graphs=known)).verdict in ("typical", "unusual")
