"""The distance of an architecture from those of training."""

from __future__ import annotations

import pytest

from ghn_service.errors import CheckpointError
from ghn_service.graph.architecture import ArchitectureGraph
from ghn_service.postprocess.distribution_shift import (
    decode_statistics,
    encode_statistics,
    graph_features,
    measure_shift,
    summarize_graphs,
)
from tests.postprocess.layer_examples import ExampleLayer, chain_graph


def convolutions(width: int, depth: int) -> ArchitectureGraph:
    layers = [ExampleLayer(f"{index}.weight", (width, width, 3, 3)) for index in range(depth)]
    return chain_graph([*layers, ExampleLayer("head.weight", (10, width), is_head=True)])


TRAINING = [convolutions(width, depth) for width in (16, 24, 32, 48) for depth in range(3, 12)]


def test_training_architectures_are_typical() -> None:
    known = summarize_graphs(TRAINING)
    verdicts = [measure_shift(graph, known).verdict for graph in TRAINING]
    assert verdicts.count("typical") >= 0.9 * len(verdicts)


def test_a_huge_network_is_far_and_says_why() -> None:
    shift = measure_shift(convolutions(2048, 200), summarize_graphs(TRAINING))
    assert shift.verdict == "far"
    assert shift.percentile == 100
    assert {"log parameters", "log nodes"} <= {reason[0] for reason in shift.reasons}


def test_the_score_grows_with_the_distance() -> None:
    known = summarize_graphs(TRAINING)
    scores = [measure_shift(convolutions(width, 7), known).score for width in (32, 128, 512, 2048)]
    assert scores == sorted(scores)
    assert scores[0] < scores[-1]


def test_without_statistics_the_shift_is_unknown() -> None:
    shift = measure_shift(TRAINING[0], None)
    assert (shift.verdict, shift.score, shift.percentile) == ("unknown", None, None)


def test_statistics_round_trip() -> None:
    known = summarize_graphs(TRAINING)
    assert decode_statistics(encode_statistics(known)) == known


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"mean": {"a": 1}, "spread": {}}'])
def test_damaged_statistics_are_refused(text: str) -> None:
    with pytest.raises(CheckpointError):
        decode_statistics(text)


def test_features_do_not_depend_on_names() -> None:
    graph = convolutions(16, 3)
    renamed = chain_graph([ExampleLayer(f"x{i}.weight", s) for i, s in enumerate([(16, 16, 3, 3)] * 3 + [(10, 16)])])
    assert graph_features(graph) == graph_features(renamed)
