"""Random architectures: every one is determined by the generator's version, a split, an index and a budget.

The splits are those of DeepNets-1M (Knyazev et al. 2021, arXiv:2110.13100): ``train``, ``val`` and ``test`` share one
distribution and no stream of random choices; ``wide``, ``deep``, ``dense`` and ``bnfree`` leave it on purpose;
``reference`` is the registry. Unlike there, networks are drawn on the fly, many are small, and more families take part.

A draw goes: family, range of costs, everything about the network except its width, a usual width; if the cost is out of
range, the width is scaled once, and if that fails the draw is repeated. Costs are those of the network for 10 classes and three-channel 32 x 32 images, so that one index is one
architecture for every task.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from architectures.architecture import CANONICAL, Architecture
from architectures.draw import Draw
from architectures.families import (
    Plan,
    plan_attention_cells,
    plan_bottleneck,
    plan_cells,
    plan_convnet,
    plan_densenet,
    plan_mobilenet,
    plan_resnet,
)
from architectures.interface import Configuration, Interface
from ghn_service.errors import InvalidOptionError

GENERATOR_VERSION = 1
_MAX_TRIES = 200
_WIDTHS = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512)
_USUAL_WIDTHS = (8, 16, 16, 16, 24, 32, 32, 48, 64)


@dataclass(frozen=True, slots=True)
class Budget:
    """What a network may cost; see ``Architecture`` for the units.

    Attributes:
        least_multiply_adds: Least cost aimed at.
        most_multiply_adds: Most cost.
        most_parameters: Most trainable scalars.
        most_nodes: Most nodes of the graph.
        most_elements: Most elements written per example: a limit on memory and on the time of cheap operations.

    Raises:
        InvalidOptionError: The range is empty.
    """

    least_multiply_adds: int
    most_multiply_adds: int
    most_parameters: int = 2_000_000
    most_nodes: int = 240
    most_elements: int = 4_000_000

    def __post_init__(self) -> None:
        if not 0 < self.least_multiply_adds < self.most_multiply_adds:
            raise InvalidOptionError(
                f"expected 0 < least_multiply_adds < most_multiply_adds, got {self.least_multiply_adds} and"
                f" {self.most_multiply_adds}",
                field="budget",
            )

    @property
    def scale(self) -> int:
        """1 to 3: how deep networks of this cost are drawn."""
        return 1 + (self.most_multiply_adds > 5_000_000) + (self.most_multiply_adds > 20_000_000)

    def admits(self, architecture: Architecture) -> bool:
        """Whether the architecture costs no more than this, nor much less."""
        return (
            0.7 * self.least_multiply_adds <= architecture.multiply_adds <= 1.15 * self.most_multiply_adds
            and architecture.num_parameters <= self.most_parameters
            and architecture.num_nodes <= self.most_nodes
            and architecture.activation_elements <= self.most_elements
        )


SIZES: dict[str, Budget] = {
    "tiny": Budget(700_000, 4_000_000, most_parameters=250_000, most_nodes=120, most_elements=450_000),
    "small": Budget(3_000_000, 15_000_000, most_parameters=600_000, most_nodes=160, most_elements=900_000),
    "base": Budget(12_000_000, 60_000_000, most_parameters=2_000_000, most_nodes=240, most_elements=2_000_000),
}
SIZE_MIX = {"tiny": 0.45, "small": 0.4, "base": 0.15}
_OUTSIDE = Budget(6_000_000, 120_000_000, most_parameters=8_000_000, most_nodes=500, most_elements=6_000_000)


@dataclass(frozen=True, slots=True)
class Family:
    """A way to draw networks.

    Attributes:
        plan: Draws everything but the width.
        share: Share among the families of a split, relative.
    """

    plan: Callable[[Draw, int], Plan]
    share: float


FAMILIES: dict[str, Family] = {
    "cells": Family(plan_cells, 0.26),
    "resnet": Family(plan_resnet, 0.24),
    "convnet": Family(plan_convnet, 0.14),
    "mobilenet": Family(plan_mobilenet, 0.11),
    "bottleneck": Family(plan_bottleneck, 0.06),
    "densenet": Family(plan_densenet, 0.05),
    "attention_cells": Family(plan_attention_cells, 0.02),
}


@dataclass(frozen=True, slots=True)
class Split:
    """A population of networks.

    Attributes:
        families: Family by name.
        budget: Budget of all its networks; None for a mixture of ``SIZES``.
        description: What is special about it.
    """

    families: dict[str, Family]
    budget: Budget | None
    description: str


def _in_distribution(description: str) -> Split:
    return Split(FAMILIES, None, description)


SPLITS: dict[str, Split] = {
    "train": _in_distribution("networks to train hypernetworks on"),
    "val": _in_distribution("as train, for choices during training"),
    "test": _in_distribution("as train, for reported results"),
}


def sample_architecture(
    split: str,
    index: int,
    *,
    num_classes: int = 10,
    in_channels: int = 3,
    image_size: int = 32,
    size: str | None = None,
    budget: Budget | None = None,
    families: tuple[str, ...] | None = None,
) -> Architecture:
    """The architecture number ``index`` of ``split``; the same for the same arguments, always and everywhere.

    Task sizes do not change which architecture it is, only its input and output.

    Args:
        split: Name in ``SPLITS``.
        index: From 0 on, without end.
        num_classes: Number of classes K of the built network.
        in_channels: Channels of its input.
        image_size: Side of its input.
        size: Name in ``SIZES`` to draw from that range of costs only; another population than without.
        budget: A range of costs of one's own.
        families: Names in ``FAMILIES`` to draw from; all by default.

    Raises:
        InvalidOptionError: A name is unknown, or no network of the split fits the budget.
    """
    interface = Interface(num_classes, in_channels, image_size)
    if split not in SPLITS:
        raise InvalidOptionError(f"no split is called {split!r}; known are {', '.join(SPLITS)}", field="split")
    if index < 0:
        raise InvalidOptionError(f"index must be at least 0, got {index}", field="index")
    population = SPLITS[split]
    limit = _budget(population, size, budget)
    shares = _shares(population, families)
    draw = Draw(f"ghn-architectures/{GENERATOR_VERSION}/{split}/{index}/{limit}/{sorted(families or ())}")
    name = draw.weighted(shares)
    chosen = limit or SIZES[draw.weighted(SIZE_MIX)]
    for _ in range(_MAX_TRIES):
        plan = population.families[name].plan(draw, chosen.scale)
        configuration = fit_width(plan, draw, chosen)
        if configuration is not None:
            return Architecture(name, configuration, interface, f"{split}/{index}")
    raise InvalidOptionError(f"none of {_MAX_TRIES} networks of family {name!r} fits {limit}; widen it", field="budget")


def fit_width(plan: Plan, draw: Draw, budget: Budget) -> Configuration | None:
    """A configuration of ``plan`` that fits ``budget``: a random usual width if it does, else one scaled to fit.

    Cost grows about with the square of the width, so one correction is enough; None if that fails.
    """
    target = draw.log_uniform(budget.least_multiply_adds, budget.most_multiply_adds)
    first = draw.choice(_USUAL_WIDTHS)
    trial = Architecture("", plan(first), CANONICAL)
    if budget.admits(trial):
        return trial.configuration
    guess = first * (target / trial.multiply_adds) ** 0.5
    width = min(_WIDTHS, key=lambda item: abs(item - guess))
    if width == first:
        return None
    trial = Architecture("", plan(width), CANONICAL)
    return trial.configuration if budget.admits(trial) else None


def _budget(population: Split, size: str | None, budget: Budget | None) -> Budget | None:
    if size is not None and budget is not None:
        raise InvalidOptionError("give either size or budget, not both", field="budget")
    if size is not None and size not in SIZES:
        raise InvalidOptionError(f"no size is called {size!r}; known are {', '.join(SIZES)}", field="size")
    return SIZES[size] if size is not None else budget or population.budget


def _shares(population: Split, families: tuple[str, ...] | None) -> dict[str, float]:
    names = tuple(population.families) if families is None else families
    unknown = [name for name in names if name not in population.families]
    if unknown or not names:
        known = ", ".join(population.families)
        raise InvalidOptionError(f"expected families among {known}; got {', '.join(unknown) or 'none'}", field="families")
    return {name: population.families[name].share for name in names}
