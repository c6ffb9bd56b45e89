"""The order in which tensors are filled, and what is known by then."""

from __future__ import annotations

import pytest
import torch

from ghn_service.errors import PredictionError
from ghn_service.hypernetwork import writing
from ghn_service.parameters import ParameterSet
from ghn_service.postprocess.steps import Step
from ghn_service.predictor import PredictionOptions, Predictor
from tests.hypernetwork.small_graphs import small_ghn, small_network

GRAPH = small_network(40)
NAMES = [spec.name for spec in GRAPH.parameters()]


@pytest.fixture
def predictor() -> Predictor:
    return Predictor(small_ghn())


@pytest.mark.parametrize("max_held", [0, 500, 1 << 22], ids=["none", "some", "all"])
def test_tensors_are_told_in_order_and_final(
    predictor: Predictor, max_held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "MAX_ELEMENTS_HELD", max_held)
    counts: list[int] = []
    seen: dict[str, torch.Tensor] = {}

    def on_written(parameters: ParameterSet, count: int) -> None:
        counts.append(count)
        seen.update({name: parameters[name].clone() for name in NAMES[:count] if name not in seen})

    found = predictor.run(GRAPH, on_written=on_written).parameters
    assert counts == list(range(len(NAMES) + 1))
    assert all(torch.equal(seen[name], found[name]) for name in NAMES)


@pytest.mark.parametrize("max_held", [0, 500])
def test_how_much_is_held_changes_no_value(
    predictor: Predictor, max_held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = predictor.predict(GRAPH)
    monkeypatch.setattr(writing, "MAX_ELEMENTS_HELD", max_held)
    found = predictor.predict(GRAPH)
    assert all(torch.equal(found[name], expected[name]) for name in NAMES)


def test_only_wanted_tensors_are_told(predictor: Predictor) -> None:
    told: list[list[str]] = []
    options = PredictionOptions(include=("head.*",))
    predictor.run(GRAPH, options=options, on_written=lambda parameters, count: told.append(list(parameters)[:count]))
    assert told == [[], ["head.weight"], ["head.weight", "head.bias"]]


def test_nothing_is_told_of_a_prediction_that_goes_on_to_its_steps(predictor: Predictor) -> None:
    told: list[int] = []
    options = PredictionOptions(steps=(Step("noise", {}),))
    predictor.run(GRAPH, options=options, on_written=lambda parameters, count: told.append(count))
    assert told == []


def test_nothing_is_told_before_every_value_is_known_to_be_finite(predictor: Predictor) -> None:
    told: list[int] = []
    with torch.no_grad():
        predictor.ghn.decoder.class_output.bias.fill_(torch.nan)  # type: ignore[operator,union-attr]
    with pytest.raises(PredictionError):
        predictor.run(GRAPH, on_written=lambda parameters, count: told.append(count))
    assert told == []
