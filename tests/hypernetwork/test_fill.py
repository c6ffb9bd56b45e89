"""Blocks become tensors whatever their order, and never values that are no numbers."""

from __future__ import annotations

import pytest
import torch

from ghn_service.errors import PredictionError
from ghn_service.predictor import PredictionOptions, Predictor
from tests.hypernetwork.small_graphs import small_ghn, small_network

GRAPH = small_network(40)
NAMES = [spec.name for spec in GRAPH.parameters()]


@pytest.fixture
def predictor() -> Predictor:
    return Predictor(small_ghn())


@pytest.mark.parametrize("max_held", [0, 500])
def test_how_much_is_held_changes_no_value(
    predictor: Predictor, max_held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = predictor.predict(GRAPH)
    monkeypatch.setattr("ghn_service.predictor.MAX_ELEMENTS_HELD", max_held)
    found = predictor.predict(GRAPH)
    assert all(torch.equal(found[name], expected[name]) for name in NAMES)


def test_a_part_has_the_values_of_the_whole(predictor: Predictor) -> None:
    whole = predictor.predict(GRAPH)
    part = predictor.predict(GRAPH, options=PredictionOptions(include=("head.*",)))
    assert list(part) == ["head.weight", "head.bias"]
    for name, tensor in part.items():
        torch.testing.assert_close(tensor, whole[name])


def test_values_that_are_not_finite_are_an_error(predictor: Predictor) -> None:
    with torch.no_grad():
        predictor.ghn.decoder.class_output.bias.fill_(torch.nan)  # type: ignore[operator,union-attr]
    with pytest.raises(PredictionError):
        predictor.predict(GRAPH)
