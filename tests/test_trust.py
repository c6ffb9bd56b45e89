"""The verdict on a prediction: distance from the training architectures, shares of origins, and the task."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ghn_service.errors import CheckpointError
from ghn_service.graph.architecture import ArchitectureGraph, LayerAttributes
from ghn_service.hypernetwork.checkpoint import ModelCard
from ghn_service.predictor import PredictionOptions, Predictor
from ghn_service.trust import (
    METADATA_KEY,
    KnownData,
    Trust,
    decode_statistics,
    encode_statistics,
    graph_features,
    judge,
    summarize_graphs,
)
from tests.hypernetwork.small_graphs import small_ghn, small_network
from tests.postprocess.layer_examples import ExampleLayer, chain_graph
from tests.server.fake_predictor import SUMMARY


def convolutions(width: int, depth: int) -> ArchitectureGraph:
    layers = [ExampleLayer(f"{index}.weight", (width, width, 3, 3)) for index in range(depth)]
    return chain_graph([*layers, ExampleLayer("head.weight", (10, width), is_head=True)])


TRAINING = [convolutions(width, depth) for width in (16, 24, 32, 48) for depth in range(3, 12)]
KNOWN = KnownData(graphs=summarize_graphs(TRAINING))


def trust_in(graph: ArchitectureGraph, known: KnownData = KNOWN, is_near: bool | None = None, **origins: str) -> Trust:
    names = [spec.name for spec in graph.parameters()]
    return judge(graph, dict.fromkeys(names, "predicted") | origins, {}, known, is_near=is_near)


def test_training_architectures_are_near() -> None:
    percentiles = [trust_in(graph).percentile for graph in TRAINING]
    assert sum(percentile < 95 for percentile in percentiles) >= 0.9 * len(percentiles)


def test_a_huge_network_is_far_and_says_why() -> None:
    trust = trust_in(convolutions(2048, 200))
    assert (trust.verdict, trust.percentile) == ("far", 100)
    assert {"log parameters", "log nodes"} <= {row[0] for row in trust.deviations}


def test_the_score_grows_with_the_distance() -> None:
    scores = [trust_in(convolutions(width, 7)).score for width in (32, 128, 512, 2048)]
    assert scores == sorted(scores)
    assert scores[0] < scores[-1]


def test_a_near_network_with_batchnorm_is_typical_and_one_without_is_not() -> None:
    graph = small_network(16)
    known = KnownData(graphs=summarize_graphs([small_network(width) for width in (8, 16, 24, 32)]))
    plain = replace(graph, nodes=tuple(_without_norm(node) for node in graph.nodes))
    assert trust_in(graph, known).verdict == "typical"
    assert trust_in(plain, replace(known, graphs=summarize_graphs([plain, graph]))).verdict == "unusual"


def _without_norm(node):
    return replace(node, op_type="ln") if node.op_type == "bn" else node


def test_what_is_mostly_drawn_by_a_rule_is_far_even_if_its_graph_is_near() -> None:
    graph = convolutions(24, 5)
    drawn = {spec.name: "fallback:zeros" for spec in graph.parameters()}
    assert trust_in(graph, **drawn).verdict == trust_in(graph, KnownData(), **drawn).verdict == "far"
    assert trust_in(graph, **drawn).shares["fallback"] == 1


def test_a_trained_network_of_a_near_shape_is_trusted_wherever_its_graph_is() -> None:
    graph = convolutions(2048, 200)
    taken = {spec.name: "source:mine (exact)" for spec in graph.parameters()}
    near, far = (trust_in(graph, is_near=is_near, **taken) for is_near in (True, False))
    assert (near.verdict, far.verdict, near.shares["source"]) == ("typical", "unusual", 1)
    assert not any("hypernetwork" in text for trust in (near, far) for text in (trust.advice, *trust.reasons))


def test_a_few_weights_of_a_trained_network_do_not_change_the_verdict() -> None:
    graph = convolutions(2048, 200)
    assert trust_in(graph, is_near=False, **{"0.weight": "source:mine (cut)"}).verdict == trust_in(graph).verdict


def test_without_statistics_the_distance_is_unknown() -> None:
    trust = trust_in(TRAINING[0], KnownData())
    assert (trust.verdict, trust.score, trust.percentile) == ("unknown", None, None)


def test_the_task_is_compared_where_it_is_known() -> None:
    stem = ExampleLayer("0.weight", (16, 1, 3, 3))
    graph = chain_graph([stem, ExampleLayer("head.weight", (7, 16), is_head=True)])
    attributes = LayerAttributes(stride=(2, 2), positions=64 * 64)
    nodes = tuple(replace(n, layer=attributes) if n.weight and n.weight.name == "0.weight" else n for n in graph.nodes)
    graph = replace(graph, nodes=nodes)
    known = trust_in(graph, KnownData(10, 3, 32)).reasons
    assert len(known) == len(trust_in(graph, KnownData(7, 1, 128)).reasons) + 3
    assert any("128 pixels" in reason for reason in known)


def test_shares_add_up_and_copies_are_counted_value_by_value() -> None:
    ghn = small_ghn()
    graph = small_network(3 * ghn.config.max_shape[0])
    shares = Predictor(ghn).analyze(graph).trust.shares
    assert shares["source"] + shares["predicted"] + shares["fallback"] == pytest.approx(1)
    assert 0.5 < shares["copied"] < shares["predicted"]
    assert Predictor(ghn).analyze(small_network(4)).trust.shares["copied"] == 0


def test_analysis_and_prediction_agree_and_the_part_asked_for_does_not_matter() -> None:
    card = ModelCard(details={METADATA_KEY: encode_statistics(KNOWN.graphs), "channels": 3, "image_size": 32})
    predictor, graph = Predictor(small_ghn(), replace(SUMMARY, card=card)), small_network(16)
    part = PredictionOptions(include=(next(graph.parameters()).name,))
    assert predictor.analyze(graph).trust == predictor.run(graph).trust == predictor.run(graph, options=part).trust


def test_statistics_round_trip() -> None:
    assert decode_statistics(encode_statistics(KNOWN.graphs)) == KNOWN.graphs


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"mean": {"a": 1}, "spread": {}}'])
def test_damaged_statistics_are_refused(text: str) -> None:
    with pytest.raises(CheckpointError):
        decode_statistics(text)


def test_features_do_not_depend_on_names() -> None:
    graph = convolutions(16, 3)
    renamed = chain_graph([ExampleLayer(f"x{i}.weight", s) for i, s in enumerate([(16, 16, 3, 3)] * 3 + [(10, 16)])])
    assert graph_features(graph) == graph_features(renamed)
