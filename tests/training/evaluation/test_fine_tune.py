"""The fine-tuning comparison: curves, choice of rates, steps saved."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ghn_service.training.evaluation.fine_tune import (
    Comparison,
    Curve,
    FineTuneData,
    FineTuneSettings,
    fine_tune,
    mean_and_error,
    small_training_set,
)
from ghn_service.training.evaluation.zero_shot import he_module
from tests.training.made_images import coloured_images, normalization_of
from tests.training.training_cases import small_source

PLAN = FineTuneSettings(learning_rates=(1e-9, 0.1), choose_at=8, budgets=(8, 16), longest=24, every=4, batch_size=16)


@pytest.fixture
def data():
    images = coloured_images(256)
    rest = coloured_images(128, seed=1)
    return FineTuneData(images, rest, rest, normalization_of(images))


def test_the_better_rate_is_chosen_and_learns(data):
    curve = fine_tune(he_module(small_source(2), seed=0), data, PLAN, steps=24, seed=0)
    assert curve.learning_rate == 0.1
    assert curve.steps == (0, 4, 8, 12, 16, 20, 24)
    assert curve.at(24) > curve.at(0)


def test_a_chosen_rate_is_used(data):
    curve = fine_tune(he_module(small_source(2), seed=0), data, PLAN, steps=4, seed=0, learning_rate=0.05)
    assert curve.learning_rate == 0.05
    assert curve.steps == (0, 4)


def test_a_start_is_not_changed(data):
    module = he_module(small_source(2), seed=0)
    before = module.head.weight.clone()
    fine_tune(module, data, PLAN, steps=8, seed=0)
    assert torch.equal(module.head.weight, before)


def test_dropout_depends_on_the_seed_alone_and_leaves_the_callers_generator(data):
    module = torch.nn.Sequential(he_module(small_source(2), seed=0), torch.nn.Dropout(0.5))
    rule = dataclasses.replace(PLAN, every=1)

    def curve(seed, **options):
        return fine_tune(module, data, rule, steps=3, seed=seed, **options)

    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = curve(0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert curve(0, learning_rate=first.learning_rate) == first
    assert curve(1) != first


def test_a_trained_start_beats_he(data):
    he = he_module(small_source(2), seed=0)
    trained = he_module(small_source(2), seed=0)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1, momentum=0.9)
    for _ in range(60):
        pixels = data.normalization.apply(data.training.images)
        loss = torch.nn.functional.cross_entropy(trained(pixels), data.training.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    comparison = compare(fine_tune(trained, data, PLAN, steps=16, seed=0), fine_tune(he, data, PLAN, steps=24, seed=0))
    assert comparison.gap(0) > 0.2
    assert comparison.steps_saved(0) > 4


def compare(predicted, he):
    return Comparison("0", 0, 0, predicted, he)


def curve(*values):
    return Curve(0.1, tuple(range(0, 100 * len(values), 100)), values)


def test_steps_saved_is_interpolated():
    comparison = compare(curve(0.3, 0.5), curve(0.1, 0.2, 0.4))
    assert comparison.steps_saved(0) == 150


def test_steps_saved_is_negative_where_he_is_faster():
    assert compare(curve(0.125, 0.25), curve(0.125, 0.375)).steps_saved(100) == -50


def test_a_level_that_he_never_reaches_counts_its_whole_length():
    comparison = compare(curve(0.1, 0.9), curve(0.1, 0.2, 0.3))
    assert comparison.he.steps_to_reach(0.9) is None
    assert comparison.steps_saved(100) == 100


def test_a_small_training_set_is_balanced():
    images = coloured_images(200)
    small = small_training_set(images, 40, seed=0)
    assert torch.bincount(small.labels).tolist() == [10, 10, 10, 10]


def test_the_standard_error_is_that_of_the_mean():
    mean, error = mean_and_error([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5
    assert error == pytest.approx(torch.tensor([1.0, 2.0, 3.0, 4.0]).std().item() / 2)
