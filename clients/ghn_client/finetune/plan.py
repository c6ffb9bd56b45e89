"""``plan``: what each strategy would train, store and be able to express for a network, before anything is trained.

Capacities come with their source; what a strategy cannot do for this network is said in words.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise

from torch import nn

from ghn_client.errors import InvalidOptionError
from ghn_client.finetune.patch.capacity import (
    SOURCE,
    check_counts,
    hidden_widths,
    three_layer_neurons,
    two_layer_capacity,
    two_layer_neurons,
)
from ghn_client.finetune.plan_facts import NetworkFacts, facts_of_module

#: Bytes per trained number beyond the weights: gradient, and the moments of the optimizer.
OPTIMIZER_BYTES = {"sgd": 8, "adamw": 12}
#: Of a delta file besides its numbers.
HEADER_BYTES = 1024


@dataclass(frozen=True)
class StrategyPlan:
    """One strategy for one network.

    Attributes:
        strategy: Name in ``STRATEGIES``, or ``patch``.
        trainable: Numbers that are trained or computed.
        delta_bytes: Size of the delta file.
        training_bytes: Memory for gradients and optimizer state, without activations.
        capacity: Labels that can surely be changed, ``None`` where no theory says.
        capacity_source: Where that comes from, or why it is not known.
        cannot: What it cannot do for this network; empty if nothing stands against it.
    """

    strategy: str
    trainable: int
    delta_bytes: int
    training_bytes: int
    capacity: int | None
    capacity_source: str
    cannot: str = ""


@dataclass(frozen=True)
class Plan:
    """All strategies for a network, and which one to try first.

    Attributes:
        facts: What was counted in the network.
        samples: Samples K.
        changed: Labels N that have to change.
        rows: One entry per strategy.
        recommended: Name of the strategy to try first.
        reason: Why.
    """

    facts: NetworkFacts
    samples: int
    changed: int
    rows: tuple[StrategyPlan, ...]
    recommended: str
    reason: str

    def to_json(self) -> str:
        """The whole plan."""
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        lines = [f"{'strategy':<20}{'trainable':>14}{'delta':>12}{'training':>12}{'labels':>10}  notes"]
        for row in self.rows:
            labels = "-" if row.capacity is None else f"{row.capacity:,}"
            lines.append(
                f"{row.strategy:<20}{row.trainable:>14,}{_size(row.delta_bytes):>12}{_size(row.training_bytes):>12}"
                f"{labels:>10}  {row.cannot or row.capacity_source}"
            )
        return "\n".join([*lines, f"recommended: {self.recommended} - {self.reason}"])


def plan(
    network: nn.Module | NetworkFacts,
    *,
    samples: int,
    changed: int | None = None,
    classes: int | None = None,
    memory_bytes: int | None = None,
    rank: int = 8,
    optimizer: str = "sgd",
) -> Plan:
    """Compares all strategies for a network and a task.

    Args:
        network: A module, or :func:`ghn_client.finetune.plan_facts.facts_of_onnx`.
        samples: Training samples K.
        changed: Labels N that have to change; default all.
        classes: Outputs C; default those of the head.
        memory_bytes: What gradients and optimizer state may take.
        rank: For ``low_rank_update``.
        optimizer: ``sgd`` (with momentum) or ``adamw``.

    Raises:
        InvalidOptionError: A count or an option is impossible.
    """
    changed = samples if changed is None else changed
    check_counts(changed, samples)
    if optimizer not in OPTIMIZER_BYTES or rank < 1 or (classes is not None and classes < 2):
        raise InvalidOptionError(
            f"expected optimizer of {', '.join(OPTIMIZER_BYTES)}, rank >= 1, classes >= 2; got {optimizer!r}, {rank},"
            f" {classes}"
        )
    facts = network if isinstance(network, NetworkFacts) else facts_of_module(network)
    outputs = classes or facts.head_outputs
    rows = tuple(_row(maker, facts, samples, changed, outputs, rank, optimizer, memory_bytes) for maker in _ROWS)
    recommended, reason = _recommend(rows, facts, samples, changed)
    return Plan(facts, samples, changed, rows, recommended, reason)


#: strategy, trainable numbers, capacity or None, source of the capacity, what it cannot do.
_Answer = tuple[str, int, int | None, str, str]
_Maker = Callable[[NetworkFacts, int, int, int, int], _Answer]
_NO_THEORY = "no capacity theory for a trained strategy of this kind; try it against its controls"


def _all(facts: NetworkFacts, samples: int, changed: int, outputs: int, rank: int) -> _Answer:
    return "all", facts.parameters, None, _NO_THEORY, ""


def _norm_only(facts: NetworkFacts, samples: int, changed: int, outputs: int, rank: int) -> _Answer:
    if not facts.norm_parameters:
        return (
            "norm_only",
            facts.head_parameters,
            None,
            "",
            "no norm layer; pass missing='insert' to add identity norms",
        )
    note = "expresses any network about sqrt(width) times smaller (arXiv:2302.07937); see express for the exact width"
    kinds = set(facts.norm_kinds) - {"batch_norm"}
    cannot = f"exact solving (express) needs BatchNorm, this network has {', '.join(sorted(kinds))}" if kinds else ""
    return "norm_only", facts.norm_parameters + facts.head_parameters, None, note, cannot


def _bias(facts: NetworkFacts, samples: int, changed: int, outputs: int, rank: int) -> _Answer:
    cannot = "" if facts.bias_parameters else "the network has no bias"
    return "bias_only", facts.bias_parameters, None, _NO_THEORY, cannot


def _head(facts: NetworkFacts, samples: int, changed: int, outputs: int, rank: int) -> _Answer:
    source = "a linear classifier separates at most head inputs + 1 samples in general position (Cover 1965)"
    return "head_only", facts.head_parameters, min(samples, facts.head_inputs + 1), source, ""


def _low_rank(facts: NetworkFacts, samples: int, changed: int, outputs: int, rank: int) -> _Answer:
    if not facts.factored_parameters:
        return "low_rank", 0, None, "", "no factored layer; predict with low-rank output or factorize the module first"
    return "low_rank", facts.factored_parameters + facts.head_parameters, None, _NO_THEORY, ""


def _low_rank_update(facts: NetworkFacts, samples: int, changed: int, outputs: int, rank: int) -> _Answer:
    numbers = sum(min(rank, rows, columns) * (rows + columns) for rows, columns in facts.matrices[:-1])
    return "low_rank_update", numbers + facts.head_parameters, None, _NO_THEORY, ""


def _additive(depth: int) -> _Maker:
    def make(facts: NetworkFacts, samples: int, changed: int, outputs: int, rank: int) -> _Answer:
        hidden = hidden_widths(depth, changed=changed, samples=samples, outputs=outputs)
        widths = [facts.head_inputs, *hidden, outputs]
        numbers = sum((a + 1) * b for a, b in pairwise(widths))
        capacity = two_layer_capacity(hidden[0], samples) if depth == 2 else changed
        return f"additive (depth {depth})", numbers, capacity, SOURCE, ""

    return make


def _patch(facts: NetworkFacts, samples: int, changed: int, outputs: int, rank: int) -> _Answer:
    neurons = two_layer_neurons(changed, samples)
    numbers = changed * facts.head_inputs + neurons * (1 + outputs)
    deep = three_layer_neurons(changed)
    source = f"exact, not trained: at most {neurons:,} neurons in 2 layers, {deep:,} per output in 3; {SOURCE}"
    return "patch", numbers, changed, source, "changes the given labels alone; it does not generalise"


_ROWS: tuple[_Maker, ...] = (
    _all, _norm_only, _bias, _head, _low_rank, _low_rank_update, _additive(2), _additive(3), _patch,
)  # fmt: skip


def _row(
    maker: _Maker,
    facts: NetworkFacts,
    samples: int,
    changed: int,
    outputs: int,
    rank: int,
    optimizer: str,
    memory_bytes: int | None,
) -> StrategyPlan:
    name, numbers, capacity, source, cannot = maker(facts, samples, changed, outputs, rank)
    training = 0 if name == "patch" else numbers * OPTIMIZER_BYTES[optimizer]
    if memory_bytes is not None and training > memory_bytes:
        cannot = f"{cannot}; " * bool(cannot) + f"needs {_size(training)} for training, {_size(memory_bytes)} are given"
    return StrategyPlan(name, numbers, 4 * numbers + HEADER_BYTES, training, capacity, source, cannot)


def _recommend(rows: tuple[StrategyPlan, ...], facts: NetworkFacts, samples: int, changed: int) -> tuple[str, str]:
    by_name = {row.strategy: row for row in rows}
    fits = {row.strategy for row in rows if "for training" not in row.cannot}
    if changed < samples and changed <= max(1, samples // 20):
        return "patch", f"only {changed:,} of {samples:,} labels change: exact, certified, and all others stay"
    if facts.factored_parameters and "low_rank" in fits:
        return "low_rank", "the network is factored already"
    if "all" in fits and samples >= 10_000 and by_name["all"].training_bytes <= 2 * 2**30:
        return "all", "enough samples, and the whole network fits in memory; norm_only is the cheap comparison"
    if facts.norm_parameters and "norm_only" in fits:
        return "norm_only", "few samples or little memory: about two numbers per channel, a delta of kilobytes"
    if "low_rank_update" in fits:
        return "low_rank_update", "no norm layers to tune; a low-rank change trains few numbers"
    return "head_only", "nothing else fits in the given memory"


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{count} B"
