"""Reports, steps and factors of real predictions, through the predictor."""

from __future__ import annotations

import json

import pytest
import torch

from ghn_service.hypernetwork.checkpoint import ModelCard, load_checkpoint, save_checkpoint
from ghn_service.postprocess.low_rank.factorize import METHODS
from ghn_service.postprocess.low_rank.ranks import LowRank
from ghn_service.postprocess.steps import Step
from ghn_service.predictor import PredictionOptions, Predictor
from ghn_service.trust import METADATA_KEY, encode_statistics, summarize_graphs
from tests.hypernetwork.small_graphs import small_ghn, small_network

NETWORK = small_network(40)


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(small_ghn())


def test_a_report_is_made_only_if_asked_for(predictor: Predictor) -> None:
    assert predictor.run(NETWORK).report is None
    report = predictor.run(NETWORK, options=PredictionOptions(report=True)).report
    assert json.dumps(report, allow_nan=False)


def test_asking_for_a_report_changes_no_value(predictor: Predictor) -> None:
    plain = predictor.predict(NETWORK, options=PredictionOptions(seed=3))
    reported = predictor.predict(NETWORK, options=PredictionOptions(seed=3, report=True))
    assert all(torch.equal(plain[name], reported[name]) for name in plain)


def test_the_report_sees_what_the_steps_did(predictor: Predictor) -> None:
    options = PredictionOptions(steps=(Step("auto"),), report=True)
    report = predictor.run(NETWORK, options=options).report
    assert report["summary"]["after"]["tiled_share"] < report["summary"]["before"]["tiled_share"]
    assert report["summary"]["after"]["effective_rank"] > report["summary"]["before"]["effective_rank"]
    assert report["steps"][0]["name"] == "auto"


def test_a_checkpoint_that_knows_its_training_graphs_tells_the_distance(tmp_path) -> None:
    graphs = [small_network(width) for width in (8, 16, 24, 32)]
    card = ModelCard(details={METADATA_KEY: encode_statistics(summarize_graphs(graphs))})
    save_checkpoint(small_ghn(), tmp_path / "ghn.safetensors", card=card)
    predictor = Predictor(*load_checkpoint(tmp_path / "ghn.safetensors"))
    report = predictor.run(small_network(16), options=PredictionOptions(report=True)).report
    assert report["trust"]["percentile"] < 95


@pytest.mark.parametrize("method", METHODS)
def test_factors_of_a_prediction_come_in_the_place_of_its_weights(predictor: Predictor, method: str) -> None:
    options = PredictionOptions(low_rank=LowRank("fraction", 0.25, method))
    result = predictor.run(NETWORK, options=options)
    factored = [layer for layer in result.low_rank.layers if layer.chosen.rank]
    assert factored
    dense = predictor.predict(NETWORK)
    for layer in factored:
        first, second = (result.parameters[name] for name in layer.factors)
        weight = dense[layer.parameter].flatten(1)
        product = second.flatten(1) @ first.flatten(1)
        # Rows of the length of W's own (scaled) can be farther from it than none.
        assert float((product - weight).norm()) < (1.5 if method == "scaled" else 0.999) * float(weight.norm())
        assert layer.parameter not in result.parameters


def test_steps_come_before_factors(predictor: Predictor) -> None:
    low_rank = LowRank("fraction", 0.25, "spectral")
    steps = (Step("noise", {"beta": "1", "scale": "relative"}),)
    noisy = predictor.predict(NETWORK, options=PredictionOptions(steps=steps, low_rank=low_rank))
    plain = predictor.predict(NETWORK, options=PredictionOptions(low_rank=low_rank))
    name = next(name for name in plain if name.endswith(".factor_in"))
    assert not torch.equal(noisy[name], plain[name])


def test_factors_are_included_with_the_weight_that_they_stand_for(predictor: Predictor) -> None:
    low_rank = LowRank("fraction", 0.25, "spectral")
    whole = predictor.run(NETWORK, options=PredictionOptions(low_rank=low_rank))
    layer = next(layer for layer in whole.low_rank.layers if layer.chosen.rank)
    part = predictor.predict(NETWORK, options=PredictionOptions(low_rank=low_rank, include=(layer.parameter,)))
    assert tuple(part) == layer.factors
