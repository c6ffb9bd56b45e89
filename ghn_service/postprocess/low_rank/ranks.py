"""What a request for low rank says, what each rank of a layer costs in accuracy, and how ranks are chosen.

The rows of the rank-r projection have squared lengths that are cumulative sums over singular directions, and lengths
are all that the kernel needs: one decomposition gives the error of every rank, without building any factors.

A budget is a multiple-choice knapsack: each layer takes one of its ranks (or stays dense), at a cost and an error.
Errors fall convexly with rank, so walking down the lower convex hull of every layer in the order of error saved per
cost is optimal up to the last step; what is left over is spent on the largest single improvements that still fit.

Shapes: W (m, d), full rank k = min(m, d).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ghn_service.errors import InvalidOptionError
from ghn_service.postprocess.low_rank.factorize import METHODS, SCALED, SPECTRAL, Decomposition
from ghn_service.postprocess.low_rank.kernels import ActivationKernel
from ghn_service.postprocess.options import require_known, require_share

RANK, FRACTION, ENERGY, FUNCTION_ERROR = "rank", "fraction", "energy", "function_error"
PARAMETER_BUDGET, MULTIPLY_ADD_BUDGET = "parameter_budget", "multiply_add_budget"
RANK_RULES = (RANK, FRACTION, ENERGY, FUNCTION_ERROR, PARAMETER_BUDGET, MULTIPLY_ADD_BUDGET)

DENSE = 0


@dataclass(frozen=True, slots=True)
class LowRank:
    """Asks for factors instead of dense weights.

    Attributes:
        rule: How ranks are chosen: ``rank`` (the same for every layer), ``fraction`` (of each layer's full rank),
            ``energy`` (share of the squared singular values to keep), ``function_error`` (the most error relative to
            the layer's output), ``parameter_budget`` or ``multiply_add_budget`` (the most of the whole network).
        value: The number of the rule.
        method: How factors are computed, one of ``METHODS``.
        with_curves: Whether the record of a layer also says what other ranks would cost.
        force: Whether the method is used also where a normalisation behind the layer cancels what it does.

    Raises:
        InvalidOptionError: A value is impossible; ``field`` names it.
    """

    rule: str
    value: float
    method: str = SCALED
    with_curves: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        require_known(self.rule, RANK_RULES, field="low_rank.rank_rule")
        require_known(self.method, METHODS, field="low_rank.method")
        if self.rule in (FRACTION, ENERGY, FUNCTION_ERROR):
            require_share(self.value, field=self.field, one=self.rule != FUNCTION_ERROR)
        elif not math.isfinite(self.value) or self.value < 1 or self.value != int(self.value):
            raise InvalidOptionError(f"expected a whole number of at least 1, got {self.value}", field=self.field)

    @property
    def field(self) -> str:
        """Path of the rule in the request."""
        return f"low_rank.{self.rule}"

    @property
    def is_budget(self) -> bool:
        """Whether the rule is about the network and not about each layer."""
        return self.rule in (PARAMETER_BUDGET, MULTIPLY_ADD_BUDGET)


@dataclass(frozen=True, eq=False, slots=True)
class RankErrors:
    """The error of a layer at every rank.

    Attributes:
        target: Lengths (m,) of the rows of W.
        squared_lengths: (m, k): entry (i, r - 1) is the squared length of row i of the rank-r projection.
        energies: Squared singular values (k,), descending.
        kernel: The activation that follows.
        method: How factors are computed; ``function_optimized`` counts as ``function``, which is never better.
        normalized: Whether a normalisation gives every row its length back whatever the factors are.
    """

    target: torch.Tensor
    squared_lengths: torch.Tensor
    energies: torch.Tensor
    kernel: ActivationKernel
    method: str
    normalized: bool

    @classmethod
    def of(cls, decomposition: Decomposition, kernel: ActivationKernel, method: str, *, normalized: bool) -> RankErrors:
        """The errors of a decomposed weight."""
        left, values, _ = decomposition.truncated(min(decomposition.matrix.shape))
        target, lengths = decomposition.matrix.double().norm(dim=1), (left * values).square().cumsum(dim=1)
        return cls(target, lengths, values.double().square(), kernel, method, normalized)

    def kept_energy(self, rank: int) -> float:
        """Share of the squared singular values that a rank keeps; 1 for a weight of zeros."""
        total = float(self.energies.sum())
        return float(self.energies[:rank].sum()) / total if total > 0 else 1.0

    def function_error(self, rank: int) -> float:
        """Loss of the layer's function at a rank, relative to the second moment of its output."""
        target, kernel, tiny = self.target, self.kernel, torch.finfo(self.target.dtype).tiny
        lengths = torch.minimum(self.squared_lengths[:, rank - 1].double().clamp_min(0.0).sqrt(), target)
        cosine = torch.where(target > 0, lengths / target.clamp_min(tiny), 1.0)
        if self.normalized:
            loss = kernel.loss(target, target, cosine)
        elif self.method == SCALED:
            loss = kernel.loss(target, lengths * (target.norm() / lengths.norm().clamp_min(tiny)), cosine)
        else:
            loss = kernel.loss(target, lengths, cosine)
            if self.method != SPECTRAL:
                loss = torch.minimum(loss, kernel.loss(target, kernel.best_length(target, cosine), cosine))
        whole = float(kernel.second_moment(target).sum())
        return float(loss.sum()) / whole if whole > 0 else 0.0


def choose_rank(full_rank: int, request: LowRank, errors: Callable[[], RankErrors]) -> int:
    """The rank that a rule (not a budget) gives to one layer; ``errors`` is called by rules that look at the weight."""
    if request.rule == RANK:
        return min(int(request.value), full_rank)
    if request.rule == FRACTION:
        return min(max(round(request.value * full_rank), 1), full_rank)
    known = errors()
    low, high = 1, full_rank
    while low < high:  # bisection for the smallest rank that is enough; the full rank always is
        middle = (low + high) // 2
        if request.rule == ENERGY:
            is_enough = known.kept_energy(middle) >= request.value - 1e-9
        else:
            is_enough = known.function_error(middle) <= request.value
        low, high = (low, middle) if is_enough else (middle + 1, high)
    return low


def candidate_ranks(full_rank: int) -> list[int]:
    """About 32 ranks from 1 to the full rank, evenly spread on a logarithmic scale."""
    steps = torch.logspace(0, math.log10(full_rank), 32, dtype=torch.float64).round()
    return sorted({min(max(int(step), 1), full_rank) for step in steps.tolist()} | {full_rank})


class RankOption(NamedTuple):
    """What a layer can choose: a rank, or ``DENSE``, at a cost and an error."""

    cost: int
    error: float
    rank: int


def allocate_ranks(options: Sequence[Sequence[RankOption]], budget: int, *, field: str) -> list[int]:
    """Ranks of least total error within a budget for all; every layer's options ascend in cost.

    Raises:
        InvalidOptionError: Even the cheapest choice of every layer costs more than the budget.
    """
    chosen = [0] * len(options)
    left = budget - sum(layer[0].cost for layer in options)
    if left < 0:
        raise InvalidOptionError(
            f"the budget for the weighted layers is {budget}, but rank 1 everywhere already costs {budget - left}",
            field=field,
        )
    # Every step along every hull; less is saved per cost from step to step, so that sorting keeps them in order.
    steps: list[tuple[float, int, int, int]] = []
    for layer, choices in enumerate(options):
        hull = lower_hull([(option.cost, option.error) for option in choices])
        for source, target in itertools.pairwise(hull):
            before, after = choices[source], choices[target]
            slope = (before.error - after.error) / (after.cost - before.cost)
            steps.append((-slope, layer, source, target))
    for _, layer, source, target in sorted(steps):
        cost = options[layer][target].cost - options[layer][source].cost
        if chosen[layer] == source and cost <= left:
            left, chosen[layer] = left - cost, target
    # What is left goes to the largest single improvements that still fit.
    while True:
        best = (0.0, 0, -1, 0)
        for layer, choices in enumerate(options):
            here = choices[chosen[layer]]
            for target in range(chosen[layer] + 1, len(choices)):
                extra, saved = choices[target].cost - here.cost, here.error - choices[target].error
                if extra <= left and saved > best[0]:
                    best = (saved, extra, layer, target)
        if best[2] < 0:
            return [choices[index].rank for choices, index in zip(options, chosen, strict=True)]
        left, chosen[best[2]] = left - best[1], best[3]


def lower_hull(points: Sequence[tuple[int, float]]) -> list[int]:
    """Indices of the lower convex hull of points that ascend in their first coordinate, from first to last."""
    hull: list[int] = []
    for index, (x, y) in enumerate(points):
        while len(hull) >= 2:
            (x0, y0), (x1, y1) = points[hull[-2]], points[hull[-1]]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                break
            hull.pop()
        hull.append(index)
    return hull
