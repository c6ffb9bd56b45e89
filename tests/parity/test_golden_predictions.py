"""Predictions for the reference's graphs and seeded hypernetworks agree with the reference implementation's."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ghn_service.graph.architecture import shortest_distances
from ghn_service.hypernetwork.features import GraphBatch, build_features, collate
from ghn_service.hypernetwork.ghn import GraphHyperNetwork
from ghn_service.parameters import PREDICTED, TILED
from ghn_service.predictor import Predictor
from tests.golden_checkpoints import golden_ghn
from tests.golden_graphs import (
    GOLDEN_CIFAR_MODELS,
    GOLDEN_MODELS,
    fingerprint_deviation,
    golden_distances,
    golden_graph,
    load_golden,
    permuted,
)

TOLERANCE = 5e-5
CASES = [(model, ghn) for model in GOLDEN_MODELS for ghn in ("ghn3_seeded", "ghn2_seeded")] + [
    (model, "ghn2_cifar10_seeded") for model in GOLDEN_CIFAR_MODELS
]
DIFFERENTIABLE_CASES = [
    (model, ghn)
    for model in ("resnet18", "mobilenet_v3_small", "squeezenet1_1", "swin_t", "vit_b_16")
    for ghn in ("ghn3_seeded", "ghn2_seeded")
]
SMALL_CASES = [
    (model, ghn)
    for model in ("mobilenet_v3_small", "squeezenet1_1", "shufflenet_v2_x0_5")
    for ghn in ("ghn3_seeded", "ghn2_seeded")
]


@functools.lru_cache(maxsize=1)
def batch_of(model: str, ghn: GraphHyperNetwork) -> GraphBatch:
    return collate([build_features(golden_graph(load_golden(model)), ghn.config)])


def deviation(rows: Tensor, expected: list[list[float]]) -> float:
    """Largest difference of norms and first entries, relative to the rms of each row."""
    reference = torch.tensor(expected)
    found = torch.cat((rows.norm(dim=1, keepdim=True) / math.sqrt(rows.shape[1]), rows[:, :4]), dim=1)
    rms = reference[:, :1] / math.sqrt(rows.shape[1])
    return float(((found - torch.cat((rms, reference[:, 1:]), dim=1)).abs() / rms).max())


@pytest.mark.parametrize("model", GOLDEN_MODELS + GOLDEN_CIFAR_MODELS)
def test_distance_matrix_is_the_reference_s(model):
    record = load_golden(model)
    graph = golden_graph(record)
    found = shortest_distances(graph, cutoff=record["ve"]["cutoff"])
    np.testing.assert_array_equal(found, golden_distances(record))


@pytest.mark.parametrize(("model", "name"), CASES)
@torch.inference_mode()
def test_node_features_and_embeddings_are_the_reference_s(model, name):
    ghn = golden_ghn(name)
    batch = batch_of(model, ghn)
    expected = load_golden(model)["predictions"][name]["node_embeddings"]
    features = ghn.node_encoder(batch.data.type_row, batch.data.shape_rows, batch.data.places)
    assert deviation(features, expected["x0"]) < 1e-6
    assert deviation(ghn.encode(batch), expected["x_ln"]) < TOLERANCE


@pytest.mark.parametrize(("model", "name"), CASES)
def test_predicted_parameters_are_the_reference_s(model, name):
    record = load_golden(model)
    parameters = Predictor(golden_ghn(name)).predict(golden_graph(record))
    expected = record["predictions"][name]
    deviations = {key: fingerprint_deviation(value, parameters[key]) for key, value in expected["params"].items()}
    assert {key: value for key, value in deviations.items() if value > TOLERANCE} == {}


@pytest.mark.parametrize(("model", "name"), DIFFERENTIABLE_CASES)
@torch.inference_mode()
def test_differentiable_decoding_gives_the_reference_s_values_too(model, name):
    ghn = golden_ghn(name)
    batch = batch_of(model, ghn)
    (found,) = ghn(batch)
    expected = load_golden(model)["predictions"][name]["params"]
    assert max(fingerprint_deviation(value, found[key]) for key, value in expected.items()) < TOLERANCE


@pytest.mark.parametrize(("model", "name"), CASES)
def test_exactly_the_reference_s_parameters_are_left_to_fallbacks(model, name):
    record = load_golden(model)
    origins = Predictor(golden_ghn(name)).analyze(golden_graph(record)).origins
    left = {key for key, origin in origins.items() if origin not in (PREDICTED, TILED)}
    assert left == set(record["predictions"][name]["not_predicted"])


@pytest.mark.parametrize(("model", "name"), SMALL_CASES)
def test_any_topological_order_gives_the_same_values(model, name):
    record = load_golden(model)
    parameters = Predictor(golden_ghn(name)).predict(permuted(golden_graph(record), seed=5))
    expected = record["predictions"][name]["params"]
    assert max(fingerprint_deviation(value, parameters[key]) for key, value in expected.items()) < TOLERANCE
