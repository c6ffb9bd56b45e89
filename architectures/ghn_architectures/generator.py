"""Random architectures: every one is determined by the generator's version, a split, an index and a budget.

The splits are those of DeepNets-1M (Knyazev et al. 2021, arXiv:2110.13100): ``train``, ``val`` and ``test`` share one
distribution and no stream of random choices; ``wide``, ``deep``, ``dense`` and ``bnfree`` leave it on purpose;
``reference`` is the registry; ``broad`` is ``train`` with deeper and wider networks among it. Unlike there, networks
are drawn on the fly, many are small, and more families take part.

A draw goes: family, range of costs, everything about the network except its width, a usual width; if the cost is out of
range, the width is scaled once, and if that fails, all but family and range is drawn again. Costs are those of the
network for 10 classes and three-channel 32 x 32 images, so that one index is one architecture for every task.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ghn_architectures.architecture import CANONICAL, Architecture, Configuration, Interface
from ghn_architectures.draw import Draw
from ghn_architectures.families import (
    DEEP_FAMILIES,
    DEEPER_FAMILIES,
    DENSE_FAMILIES,
    FAMILIES,
    NORM_FREE_FAMILIES,
    Family,
    Plan,
)
from ghn_architectures.registry import ARCHITECTURES, reference_architecture
from ghn_service.errors import InvalidOptionError

GENERATOR_VERSION = 1
_MAX_TRIES = 200


@dataclass(frozen=True, slots=True)
class Budget:
    """What a network may cost; see ``Architecture`` for the units.

    Attributes:
        least_multiply_adds: Least cost aimed at.
        most_multiply_adds: Most cost.
        most_parameters: Most trainable scalars.
        least_nodes: Least nodes of the graph.
        most_nodes: Most nodes of the graph.
        most_elements: Most elements written per example: a limit on memory and on the time of cheap operations.

    Raises:
        InvalidOptionError: The range is empty.
    """

    least_multiply_adds: int
    most_multiply_adds: int
    most_parameters: int = 2_000_000
    least_nodes: int = 0
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
        """Whether the architecture costs no more than this, nor much less (in parameters, for perceptrons)."""
        cost, num_parameters = architecture.trace(), architecture.num_parameters
        is_large = cost.multiply_adds >= 0.7 * self.least_multiply_adds or num_parameters >= 0.3 * self.most_parameters
        return (
            is_large
            and cost.multiply_adds <= 1.15 * self.most_multiply_adds
            and num_parameters <= self.most_parameters
            and self.least_nodes <= cost.graph.num_nodes <= self.most_nodes
            and cost.activation_elements <= self.most_elements
        )


SIZES: dict[str, Budget] = {
    "tiny": Budget(700_000, 4_000_000, most_parameters=250_000, most_nodes=120, most_elements=450_000),
    "small": Budget(3_000_000, 15_000_000, most_parameters=600_000, most_nodes=160, most_elements=900_000),
    "base": Budget(12_000_000, 60_000_000, most_parameters=2_000_000, most_nodes=200, most_elements=2_000_000),
}
SIZE_MIX = {"tiny": 0.45, "small": 0.4, "base": 0.15}
_WIDTHS = tuple(range(8, 72, 8))
_USUAL_WIDTHS = ((8, 8, 16, 16, 24, 32), (8, 16, 16, 24, 32, 48), (16, 16, 24, 32, 48, 64))


@dataclass(frozen=True, slots=True)
class Split:
    """A population of networks.

    Attributes:
        families: Family by name.
        budget: Budget of all its networks; None for a mixture of ``SIZES``.
        widths: Base widths that occur.
        usual_widths: Base widths tried first, for scales 1, 2, and 3 or more.
        scale: Scale given to plans; 0 for that of the budget.
        parts: Other splits by name and share, for a mixture of them; then nothing else of this counts.
    """

    families: dict[str, Family]
    budget: Budget | None = None
    widths: tuple[int, ...] = _WIDTHS
    usual_widths: tuple[tuple[int, ...], ...] = _USUAL_WIDTHS
    scale: int = 0
    parts: dict[str, float] = dataclasses.field(default_factory=dict)


def _outside(least: int, most: int, *, least_nodes: int = 0, most_nodes: int = 600) -> Budget:
    return Budget(least, most, 10_000_000, least_nodes, most_nodes, 6_000_000)


SPLITS: dict[str, Split] = {
    "train": Split(FAMILIES),  # networks to train hypernetworks on
    "val": Split(FAMILIES),  # as train, for choices during training
    "test": Split(FAMILIES),  # as train, for reported results
    "wide": Split(  # more channels than any of train: 80 to 256 in the first stage, where train has 8 to 64
        FAMILIES,
        _outside(8_000_000, 240_000_000, most_nodes=200),
        widths=tuple(range(80, 272, 16)),
        usual_widths=((80, 96, 128, 128, 160),),
        scale=1,
    ),
    # more nodes than any of train: 220 to 600
    "deep": Split(DEEP_FAMILIES, _outside(4_000_000, 120_000_000, least_nodes=220), scale=9),
    # cells of 4 to 8 steps, where train has 1 to 3
    "dense": Split(DENSE_FAMILIES, _outside(3_000_000, 120_000_000), scale=1),
    "bnfree": Split(NORM_FREE_FAMILIES),  # convolutional families, none with batch normalisation
    "reference": Split({}),  # the networks of the registry, in its order
    "train_deep": Split(  # deeper networks to train on: 5 to 18 blocks per stage, where train has 1 to 4
        DEEPER_FAMILIES,
        Budget(3_000_000, 110_000_000, most_parameters=4_000_000, most_nodes=400, most_elements=4_000_000),
        usual_widths=((8, 8, 8, 16, 16, 24),),
        scale=5,
    ),
    "train_wide": Split(  # wider networks to train on: 64 to 256 channels in the first stage
        FAMILIES,
        Budget(6_000_000, 110_000_000, most_parameters=10_000_000, most_nodes=200, most_elements=3_000_000),
        widths=tuple(range(64, 272, 16)),
        usual_widths=((64, 80, 96, 128, 192, 256),),
        scale=1,
    ),
    # networks to train on: those of train, deeper and wider ones
    "broad": Split({}, parts={"train": 0.57, "train_deep": 0.28, "train_wide": 0.15}),
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
    if split == "reference":
        if index >= len(ARCHITECTURES):
            raise InvalidOptionError(
                f"the reference split has {len(ARCHITECTURES)} networks, got index {index}", field="index"
            )
        return reference_architecture(tuple(ARCHITECTURES)[index], interface)
    if size is not None and budget is not None:
        raise InvalidOptionError("give either size or budget, not both", field="budget")
    if size is not None and size not in SIZES:
        raise InvalidOptionError(f"no size is called {size!r}; known are {', '.join(SIZES)}", field="size")
    population = SPLITS[split]
    if population.parts:
        split = Draw(f"ghn-architectures/{GENERATOR_VERSION}/{split}/{index}").weighted(population.parts)
        population = SPLITS[split]
    names = tuple(population.families) if families is None else families
    unknown = [name for name in names if name not in population.families]
    if unknown or not names:
        known = ", ".join(population.families)
        raise InvalidOptionError(
            f"expected families among {known}; got {', '.join(unknown) or 'none'}", field="families"
        )
    limit = SIZES[size] if size is not None else budget or population.budget
    limit_key = "" if limit is None else "-".join(str(value) for value in dataclasses.astuple(limit))
    key = ("ghn-architectures", str(GENERATOR_VERSION), split, str(index), limit_key, ",".join(families or ()))
    draw = Draw("/".join(key))
    name = draw.weighted({name: population.families[name].share for name in names})
    chosen = limit or SIZES[draw.weighted(SIZE_MIX)]
    scale = population.scale or chosen.scale
    for _ in range(_MAX_TRIES):
        plan = population.families[name].plan(draw, scale)
        configuration = _fit_width(plan, draw, chosen, population)
        if configuration is not None:
            return Architecture(name, configuration, interface, f"{split}/{index}")
    raise InvalidOptionError(f"none of {_MAX_TRIES} networks of family {name!r} fits {limit}; widen it", field="budget")


def _fit_width(plan: Plan, draw: Draw, budget: Budget, population: Split) -> Configuration | None:
    """A configuration of ``plan`` that fits ``budget``: a random usual width if it does, else one scaled to fit.

    Cost grows about with the square of the width, so one correction is enough; None if that fails.
    """
    target = draw.log_uniform(budget.least_multiply_adds, budget.most_multiply_adds)
    usual = population.usual_widths[min(budget.scale, len(population.usual_widths)) - 1]
    first = draw.choice(usual)
    trial = Architecture("", plan(first), CANONICAL)
    if budget.admits(trial):
        return trial.configuration
    guess = first * (target / trial.multiply_adds) ** 0.5
    width = min(population.widths, key=lambda item: abs(item - guess))
    if width == first:
        return None
    trial = Architecture("", plan(width), CANONICAL)
    return trial.configuration if budget.admits(trial) else None
