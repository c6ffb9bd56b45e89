"""The graphs that we read from ONNX equal the reference's, for every network of the reference data."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

from ghn_service.graph.architecture import ArchitectureGraph, shortest_distances
from ghn_service.graph.onnx.reader import read_onnx
from tests.data.regenerate import FORMS, WITHOUT_BATCH_NORM, stored_model
from tests.golden_graphs import GOLDEN_CIFAR_MODELS, GOLDEN_MODELS, golden_distances, load_golden
from tests.graph_comparison import align, torch_names
from tests.zoo_support import build_torchvision, export

# In training mode googlenet has its auxiliary heads; the reference data shows it without.
HAS_MORE_HEADS = {("googlenet", "dynamo-train")}
FOLDS_BATCH_NORM = {"dynamo-eval-optimize", "script-eval-optimize"}
STORED = sorted(
    (name, form)
    for form, names in FORMS.items()
    for name in names
    if (name, form) not in HAS_MORE_HEADS and (form not in FOLDS_BATCH_NORM or name in WITHOUT_BATCH_NORM)
)
LIVE_FORMS = ("dynamo-eval", "dynamo-train", "script-eval", "script-train")


@functools.cache
def stored_graph(name: str, form: str) -> ArchitectureGraph:
    return read_onnx(stored_model(name, form))


def assert_equals_reference(graph: ArchitectureGraph, record: dict[str, Any]) -> None:
    expected = golden_distances(record)
    place = align(record, expected, graph)
    assert np.array_equal(shortest_distances(graph)[np.ix_(place, place)], expected)
    assert sorted((place[source], place[target]) for source, target in record["edges"]) == list(graph.edges)
    for node, index in zip(record["nodes"], place, strict=True):
        ours = graph.nodes[index]
        assert ours.is_head == (node["last_weight"] or node["last_bias"])
        if ours.weight is not None:
            assert list(ours.weight.torch_shape) == record["state"][node["param"]]


@pytest.mark.parametrize(("name", "form"), STORED)
def test_the_graph_equals_the_reference(name: str, form: str) -> None:
    assert_equals_reference(stored_graph(name, form), load_golden(name))


@pytest.mark.parametrize(("name", "form"), STORED)
def test_the_same_parameters_are_predicted(name: str, form: str) -> None:
    record = load_golden(name)
    not_predicted = set(record["predictions"][next(iter(record["predictions"]))]["not_predicted"])
    assert torch_names(stored_graph(name, form)) == set(record["state"]) - not_predicted


@pytest.mark.parametrize(("name", "form"), STORED)
def test_what_is_not_predicted_has_a_fallback(name: str, form: str) -> None:
    record = load_golden(name)
    not_predicted = set(record["predictions"][next(iter(record["predictions"]))]["not_predicted"])
    expected = {key: record["state"][key] for key in not_predicted if not key.startswith("aux")}
    others = stored_graph(name, form).other_parameters
    assert {spec.torch_name: list(spec.torch_shape) for spec in others} == expected


@pytest.mark.parametrize("name", [*GOLDEN_MODELS, *GOLDEN_CIFAR_MODELS])
def test_the_head_comes_last(name: str) -> None:
    nodes = stored_graph(name, "script-eval").nodes
    assert [node.is_head for node in nodes] == [False] * (len(nodes) - 2) + [True, True]


def test_auxiliary_heads_are_nodes_in_training_mode() -> None:
    graph = stored_graph("googlenet", "dynamo-train")
    assert graph.num_nodes == 154
    assert {spec.name for node in graph.nodes if node.is_head for spec in node.parameters} == {"fc.weight", "fc.bias"}


@pytest.mark.zoo
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", [*GOLDEN_MODELS, *GOLDEN_CIFAR_MODELS])
def test_live_exports_equal_the_reference(name: str) -> None:
    forms = [*LIVE_FORMS, *(FOLDS_BATCH_NORM if name in WITHOUT_BATCH_NORM else ())]
    if name == "googlenet":  # its auxiliary pooling has no script export, and training mode shows other heads
        forms = ["dynamo-eval", "script-eval"]
    for form in forms:
        module, example = build_torchvision(name)
        assert_equals_reference(read_onnx(export(module, example, form)), load_golden(name))
