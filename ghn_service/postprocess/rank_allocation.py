"""How ranks are chosen: one rule for every layer, or a budget for the whole network shared out where it helps most.

A budget is a multiple-choice knapsack: each layer takes one of its ranks (or stays dense), at a cost and an error.
Errors fall convexly with rank, so walking down the lower convex hull of every layer in the order of error saved per
cost is optimal up to the last step; what is left over is spent on the largest single improvements that still fit.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ghn_service.errors import InvalidOptionError
from ghn_service.postprocess.kernels import ActivationKernel
from ghn_service.postprocess.options import require_known, require_share
from ghn_service.postprocess.spectrum import Spectrum

RANK = "rank"
FRACTION = "fraction"
ENERGY = "energy"
FUNCTION_ERROR = "function_error"
PARAMETER_BUDGET = "parameter_budget"
MULTIPLY_ADD_BUDGET = "multiply_add_budget"
RANK_RULES = (RANK, FRACTION, ENERGY, FUNCTION_ERROR, PARAMETER_BUDGET, MULTIPLY_ADD_BUDGET)

DENSE = 0


@dataclass(frozen=True, slots=True)
class RankRule:
    """How the rank of each layer is chosen.

    Attributes:
        kind: ``rank`` (the same for every layer), ``fraction`` (of each layer's full rank), ``energy`` (share of the
            squared singular values to keep), ``function_error`` (the most error relative to the layer's output),
            ``parameter_budget`` or ``multiply_add_budget`` (the most of the whole network).
        value: Its number.
    """

    kind: str
    value: float

    def __post_init__(self) -> None:
        require_known(self.kind, RANK_RULES, field="low_rank.rank_rule")
        if self.kind in (FRACTION, ENERGY):
            require_share(self.value, field=f"low_rank.{self.kind}")
        elif self.kind == FUNCTION_ERROR:
            require_share(self.value, field=f"low_rank.{self.kind}", one=False)
        elif not math.isfinite(self.value) or self.value < 1 or self.value != int(self.value):
            raise InvalidOptionError(
                f"expected a whole number of at least 1, got {self.value}", field=f"low_rank.{self.kind}"
            )

    @property
    def is_budget(self) -> bool:
        """Whether the rule is about the network and not about each layer."""
        return self.kind in (PARAMETER_BUDGET, MULTIPLY_ADD_BUDGET)


@dataclass(frozen=True, slots=True)
class RankChoice:
    """What one layer can choose from.

    Attributes:
        cost_per_rank: Cost of each unit of rank.
        dense_cost: Cost of the layer as it is.
        errors: Error by rank, for some ranks.
    """

    cost_per_rank: int
    dense_cost: int
    errors: dict[int, float]

    def options(self) -> list[tuple[int, float, int]]:
        """(cost, error, rank) of every option that is cheaper than dense, ascending in cost, then dense itself."""
        factored = [
            (rank * self.cost_per_rank, error, rank)
            for rank, error in sorted(self.errors.items())
            if rank * self.cost_per_rank < self.dense_cost
        ]
        return [*factored, (self.dense_cost, 0.0, DENSE)]


def choose_rank(
    full_rank: int,
    rule: RankRule,
    spectrum: Callable[[], Spectrum],
    *,
    kernel: ActivationKernel,
    method: str,
    normalized: bool,
) -> int:
    """The rank that a rule (not a budget) gives to one layer, at most the full rank.

    Args:
        full_rank: The rank that the shape of the weight allows.
        rule: The rule.
        spectrum: Decomposes the weight; called only by rules that look at it.
        kernel: The activation that follows.
        method: How the factors will be computed.
        normalized: Whether a normalisation sits before the activation.
    """
    if rule.kind == RANK:
        return min(int(rule.value), full_rank)
    if rule.kind == FRACTION:
        return min(max(round(rule.value * full_rank), 1), full_rank)
    decomposed = spectrum()

    def is_enough(rank: int) -> bool:
        if rule.kind == ENERGY:
            return decomposed.kept_energy(rank) >= rule.value - 1e-9
        return decomposed.function_error(rank, kernel=kernel, method=method, normalized=normalized) <= rule.value

    return _smallest_rank(full_rank, is_enough)


def _smallest_rank(full_rank: int, is_enough: Callable[[int], bool]) -> int:
    """Bisection for the smallest rank that is enough; the full rank always is."""
    low, high = 1, full_rank
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle + 1, high)
    return low


def allocate_ranks(choices: Sequence[RankChoice], budget: int, *, field: str) -> list[int]:
    """Ranks of least total error within a budget; ``DENSE`` where a layer keeps its weight.

    Args:
        choices: What each layer can choose from.
        budget: The most that all layers may cost together.
        field: Path of the budget in the request.

    Raises:
        InvalidOptionError: Even the cheapest choice of every layer costs more than the budget.
    """
    options = [choice.options() for choice in choices]
    chosen = [min(range(len(layer)), key=lambda index: layer[index][0]) for layer in options]
    spent = sum(layer[index][0] for layer, index in zip(options, chosen, strict=True))
    if spent > budget:
        raise InvalidOptionError(
            f"the budget for the weighted layers is {budget}, but rank 1 everywhere already costs {spent}", field=field
        )
    spent = _walk_hulls(options, chosen, budget, spent)
    _spend_the_rest(options, chosen, budget - spent)
    return [layer[index][2] for layer, index in zip(options, chosen, strict=True)]


def _walk_hulls(options: list[list[tuple[int, float, int]]], chosen: list[int], budget: int, spent: int) -> int:
    """Takes hull steps in the order of error saved per cost while they fit; updates ``chosen``, returns the cost."""
    hulls = [lower_hull([option[:2] for option in layer]) for layer in options]
    heap: list[tuple[float, int, int]] = []
    for layer in range(len(options)):
        _push_step(heap, layer, 0, hulls[layer], options[layer])
    while heap:
        _, layer, step = heapq.heappop(heap)
        source, target = hulls[layer][step], hulls[layer][step + 1]
        cost = options[layer][target][0] - options[layer][source][0]
        if spent + cost > budget:
            continue
        spent, chosen[layer] = spent + cost, target
        _push_step(heap, layer, step + 1, hulls[layer], options[layer])
    return spent


def _push_step(
    heap: list[tuple[float, int, int]], layer: int, step: int, hull: list[int], options: list[tuple[int, float, int]]
) -> None:
    if step + 1 < len(hull):
        (cost, error, _), (next_cost, next_error, _) = options[hull[step]], options[hull[step + 1]]
        heapq.heappush(heap, (-(error - next_error) / (next_cost - cost), layer, step))


def _spend_the_rest(options: list[list[tuple[int, float, int]]], chosen: list[int], left: int) -> None:
    """Repeatedly takes the option that lowers the error most and still fits; updates ``chosen``."""
    while True:
        best = (0.0, 0, -1, 0)
        for layer, index in enumerate(chosen):
            cost, error, _ = options[layer][index]
            for target in range(index + 1, len(options[layer])):
                extra, saved = options[layer][target][0] - cost, error - options[layer][target][1]
                if extra <= left and saved > best[0]:
                    best = (saved, extra, layer, target)
        if best[2] < 0:
            return
        left -= best[1]
        chosen[best[2]] = best[3]


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
