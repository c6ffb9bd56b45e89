"""Neuron counts of the constructions and their inverses; the constants are ours."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ghn_client.errors import InvalidOptionError
from ghn_client.finetune.express.pairing import express_width
from ghn_client.finetune.patch.capacity import (
    hidden_widths,
    three_layer_layout,
    three_layer_neurons,
    two_layer_capacity,
    two_layer_neurons,
)

COUNTS = st.integers(1, 5000)


@pytest.mark.parametrize(("changed", "neurons"), [(10, 17), (50, 39), (100, 57), (400, 113)])
def test_three_layer_counts_of_the_notes(changed, neurons):
    assert three_layer_neurons(changed) == neurons


@given(COUNTS)
def test_three_layer_needs_about_four_root_two_n(changed):
    assert three_layer_neurons(changed) <= 4 * math.sqrt(2 * changed) + 5  # what rounding G and J up can cost
    assert three_layer_neurons(changed) >= 4 * math.sqrt(2 * changed) - 1 - 1e-9


@given(COUNTS)
def test_layout_has_room_for_every_point(changed):
    groups, points = three_layer_layout(changed)
    assert groups * points >= changed


@given(COUNTS, COUNTS)
def test_two_layer_capacity_inverts_the_neuron_count(changed, more):
    samples = changed + more
    assert two_layer_capacity(two_layer_neurons(changed, samples), samples) >= changed


def test_special_cases():
    assert two_layer_neurons(5, 5) == 4
    assert two_layer_neurons(0, 5) == 0
    assert two_layer_capacity(4, 5) == 5
    assert express_width(4, 3) == 15
    assert hidden_widths(2, changed=5, samples=100, outputs=10) == (15,)
    assert sum(hidden_widths(3, changed=100, samples=1000, outputs=1)) == 57


@pytest.mark.parametrize(("changed", "samples"), [(-1, 5), (6, 5), (0, 0)])
def test_impossible_counts_are_refused(changed, samples):
    with pytest.raises(InvalidOptionError):
        two_layer_neurons(changed, samples)


def test_unknown_depth_is_refused():
    with pytest.raises(InvalidOptionError):
        hidden_widths(4, changed=1, samples=2, outputs=1)
