"""The distance of two outputs."""

from __future__ import annotations

import math

import pytest
import torch

from ghn_client.outputs import largest_relative_difference

INFINITY, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("expected", "actual", "difference"),
    [
        ([3.0, 4.0], [3.0, 4.0], 0.0),
        ([1.0, -1.0], [1.0, -1.5], 0.5),
        ([1.0, -1.0, -INFINITY, NAN], [1.0, -1.5, -INFINITY, NAN], 0.5),
        ([1.0, NAN], [1.0, NAN], 0.0),
        ([1.0, 1.0], [1.0, NAN], INFINITY),
        ([1.0, -INFINITY], [1.0, INFINITY], INFINITY),
        ([1.0, INFINITY], [1.0, 1.0], INFINITY),
        ([0.0, 0.0], [0.0, 1.0], INFINITY),
    ],
)
def test_what_is_not_finite_in_both_alike_is_equal(expected, actual, difference):
    assert largest_relative_difference(torch.tensor(expected), torch.tensor(actual)) == pytest.approx(difference)


def test_mappings_are_compared_key_by_key():
    one, two = torch.ones(2), torch.full((2,), 2.0)
    assert largest_relative_difference({"a": one, "b": two}, {"b": two, "a": one}) == 0.0
    with pytest.raises(ValueError):
        largest_relative_difference({"a": one}, {"b": one})
