"""Choosing ranks: rules for single layers, and budgets against an exhaustive search."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ghn_service.errors import InvalidOptionError
from ghn_service.postprocess.low_rank.factorize import decompose, factorize, relative_function_error
from ghn_service.postprocess.low_rank.kernels import activation_kernel
from ghn_service.postprocess.low_rank.ranks import (
    DENSE,
    RANK_RULES,
    LowRank,
    RankErrors,
    RankOption,
    allocate_ranks,
    candidate_ranks,
    choose_rank,
    lower_hull,
)


def he_normal(width: int, inputs: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randn((width, inputs), generator=torch.Generator().manual_seed(seed)) * math.sqrt(2 / inputs)


def chosen(weight: torch.Tensor, kind: str, value: float) -> int:
    return choose_rank(min(weight.shape), LowRank(kind, value), lambda: errors_of(weight))


def errors_of(weight: torch.Tensor, activation: str = "relu", method: str = "function") -> RankErrors:
    return RankErrors.of(decompose(weight), activation_kernel(activation), method, normalized=False)


def error_curve(
    weight: torch.Tensor, ranks: list[int], *, activation: str = "relu", method: str = "function"
) -> list[float]:
    errors = errors_of(weight, activation, method)
    return [errors.function_error(rank) for rank in ranks]


def options_of(per_rank: int, dense: int, errors: dict[int, float]) -> list[RankOption]:
    factored = [RankOption(rank * per_rank, error, rank) for rank, error in errors.items()]
    return [*factored, RankOption(dense, 0.0, DENSE)]


@pytest.mark.parametrize("method", ["spectral", "scaled", "function"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_the_error_curve_is_the_error_of_the_factors(method: str, activation: str) -> None:
    weight, ranks = he_normal(24, 40), [1, 5, 12, 24]
    expected = [
        relative_function_error(
            weight, *factorize(weight, rank, method=method, activation=activation), activation=activation
        )
        for rank in ranks
    ]
    assert error_curve(weight, ranks, activation=activation, method=method) == pytest.approx(expected, abs=2e-5)


def test_the_error_falls_with_rank_and_ends_at_zero() -> None:
    curve = error_curve(he_normal(16, 20), list(range(1, 17)))
    assert curve == sorted(curve, reverse=True)
    assert curve[-1] == pytest.approx(0.0, abs=1e-5)


def test_rank_and_fraction_are_taken_at_their_word() -> None:
    weight = he_normal(16, 40)
    assert chosen(weight, "rank", 5) == 5
    assert chosen(weight, "rank", 99) == 16
    assert chosen(weight, "fraction", 0.25) == 4
    assert chosen(weight, "fraction", 0.001) == 1


def test_energy_gives_the_smallest_rank_that_keeps_it() -> None:
    weight = he_normal(16, 40)
    values = torch.linalg.svdvals(weight).square()
    rank = chosen(weight, "energy", 0.7)
    shares = values.cumsum(0) / values.sum()
    assert float(shares[rank - 1]) >= 0.7 > float(shares[rank - 2])


def test_function_error_gives_the_smallest_rank_that_meets_it() -> None:
    weight = he_normal(16, 40)
    rank = chosen(weight, "function_error", 0.3)
    error, error_below = error_curve(weight, [rank, rank - 1])
    assert error <= 0.3 < error_below


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_budget_is_met_and_shared_out_almost_as_well_as_by_exhaustive_search(data: st.DataObject) -> None:
    options = []
    for _ in range(data.draw(st.integers(1, 3))):
        per_rank, count = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5))
        decay = data.draw(st.floats(0.2, 0.9))
        options.append(options_of(per_rank, per_rank * (count + 1), {r: decay**r for r in range(1, count + 1)}))
    least = sum(layer[0][0] for layer in options)
    budget = data.draw(st.integers(least, least * 4))
    ranks = allocate_ranks(options, budget, field="low_rank.parameter_budget")
    taken = [next(o for o in layer if o[2] == rank) for layer, rank in zip(options, ranks, strict=True)]
    assert sum(option[0] for option in taken) <= budget
    best = min(
        sum(option[1] for option in combination)
        for combination in itertools.product(*options)
        if sum(option[0] for option in combination) <= budget
    )
    # Greedy is optimal but for the last step, which is at most one layer's largest single saving.
    largest_step = max(a[1] - b[1] for layer in options for a, b in itertools.pairwise(layer))
    assert sum(option[1] for option in taken) <= best + largest_step + 1e-9


def test_an_ample_budget_leaves_everything_dense() -> None:
    choices = [options_of(3, 12, {1: 0.5, 2: 0.2}), options_of(2, 9, {1: 0.4})]
    assert allocate_ranks(choices, 21, field="low_rank.parameter_budget") == [DENSE, DENSE]


def test_an_impossible_budget_is_refused() -> None:
    with pytest.raises(InvalidOptionError) as error:
        allocate_ranks([options_of(3, 12, {1: 0.5})], 2, field="low_rank.parameter_budget")
    assert error.value.field == "low_rank.parameter_budget"


def test_the_lower_hull_of_convex_points_keeps_them_all() -> None:
    points = [(0, 9.0), (1, 4.0), (2, 1.0), (3, 0.0)]
    assert lower_hull(points) == [0, 1, 2, 3]
    assert lower_hull([(0, 9.0), (1, 8.5), (2, 1.0), (3, 0.0)]) == [0, 2, 3]


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("rank", 0),
        ("rank", 1.5),
        ("rank", math.nan),
        ("fraction", 0.0),
        ("fraction", 1.01),
        ("fraction", math.nan),
        ("energy", -0.1),
        ("function_error", 1.0),
        ("function_error", math.inf),
        ("parameter_budget", 0),
        ("multiply_add_budget", math.inf),
    ],
)
def test_an_impossible_rule_is_refused_with_the_field_named(kind: str, value: float) -> None:
    with pytest.raises(InvalidOptionError) as error:
        LowRank(kind, value)
    assert error.value.field == f"low_rank.{kind}"


def test_an_unknown_rule_lists_the_known_ones() -> None:
    with pytest.raises(InvalidOptionError) as error:
        LowRank("ranks", 4)
    assert all(kind in str(error.value) for kind in RANK_RULES)


@pytest.mark.parametrize("full_rank", [1, 2, 7, 100, 1000])
def test_candidate_ranks_ascend_from_one_to_the_full_rank(full_rank: int) -> None:
    ranks = candidate_ranks(full_rank)
    assert ranks == sorted(set(ranks))
    assert (ranks[0], ranks[-1]) == (1, full_rank)
    assert len(ranks) <= 33
