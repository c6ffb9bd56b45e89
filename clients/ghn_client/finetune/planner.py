"""``plan``: what each strategy would train, store and be able to express for a network, before anything is trained.

Capacities come with their source; what a strategy cannot do for this network is said in words.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import pairwise

from torch import nn

from ghn_client.errors import InvalidOptionError
from ghn_client.finetune.factored import factored_modules
from ghn_client.finetune.matrix_layers import BATCH_NORM, find_head, matrix_layers, norm_kind, norm_layers
from ghn_client.finetune.patch.capacity import (
    SOURCE,
    check_counts,
    hidden_widths,
    three_layer_neurons,
    two_layer_capacity,
    two_layer_neurons,
)

#: Bytes per trained number beyond the weights: gradient, and the moments of the optimizer.
OPTIMIZER_BYTES = {"sgd": 8, "adamw": 12}
#: Of a delta file besides its numbers.
HEADER_BYTES = 1024
_NO_THEORY = "no capacity theory for a trained strategy of this kind; try it against its controls"


@dataclass(frozen=True)
class NetworkFacts:
    """What ``plan`` counts."""

    parameters: int  # all of them
    norm_parameters: int  # scales and shifts of norm layers
    norm_kinds: tuple[str, ...]  # kinds of norm layers that occur
    bias_parameters: int  # biases, those of norm layers included
    # rows and columns of every matrix layer, convolutions flattened; the head is the last
    matrices: tuple[tuple[int, int], ...]
    factored_parameters: int  # numbers in factored layers
    head_inputs: int  # features that the head reads
    head_outputs: int  # classes
    head_parameters: int  # weight and bias of the head


def facts_of_module(module: nn.Module) -> NetworkFacts:
    """Counts a torch module; ``ghn_client.onnx.facts`` counts an ONNX file."""
    head, norms = find_head(module), norm_layers(module)
    sizes = {name: (layer.weight.shape[0], layer.weight[0].numel()) for name, layer in matrix_layers(module).items()}
    last = sizes.pop(head)
    return NetworkFacts(
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        norm_parameters=sum(value.numel() for layer in norms.values() for value in layer.parameters(recurse=False)),
        norm_kinds=tuple(sorted({kind for layer in norms.values() if (kind := norm_kind(layer))})),
        bias_parameters=sum(value.numel() for name, value in module.named_parameters() if name.endswith("bias")),
        matrices=(*sizes.values(), last),
        factored_parameters=sum(value.numel() for _, pair in factored_modules(module) for value in pair.parameters()),
        head_inputs=last[1],
        head_outputs=last[0],
        head_parameters=sum(parameter.numel() for parameter in module.get_submodule(head).parameters()),
    )


@dataclass(frozen=True)
class StrategyPlan:
    """One strategy for one network."""

    strategy: str  # name in ``STRATEGIES``, or ``patch``
    trainable: int  # numbers that are trained or computed
    delta_bytes: int  # size of the delta file
    training_bytes: int  # memory for gradients and optimizer state, without activations
    capacity: int | None  # labels that can surely be changed, ``None`` where no theory says
    capacity_source: str  # where that comes from, or why it is not known
    cannot: str = ""  # what it cannot do for this network; empty if nothing stands against it


@dataclass(frozen=True)
class Plan:
    """All strategies for a network, and which one to try first."""

    facts: NetworkFacts  # what was counted in the network
    samples: int  # samples K
    changed: int  # labels N that have to change
    rows: tuple[StrategyPlan, ...]  # one entry per strategy
    recommended: str  # name of the strategy to try first
    reason: str  # why

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
        network: A module, or :func:`ghn_client.onnx.facts.facts_of_onnx`.
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
    rows = []
    for name, numbers, capacity, source, cannot in _answers(facts, samples, changed, classes, rank):
        training = 0 if name == "patch" else numbers * OPTIMIZER_BYTES[optimizer]
        if memory_bytes is not None and training > memory_bytes:
            cannot = f"{cannot}; " * bool(cannot)
            cannot += f"needs {_size(training)} for training, {_size(memory_bytes)} are given"
        rows.append(StrategyPlan(name, numbers, 4 * numbers + HEADER_BYTES, training, capacity, source, cannot))
    recommended, reason = _recommend(rows, facts, samples, changed)
    return Plan(facts, samples, changed, tuple(rows), recommended, reason)


def _answers(
    facts: NetworkFacts, samples: int, changed: int, classes: int | None, rank: int
) -> list[tuple[str, int, int | None, str, str]]:
    """Per strategy: name, trainable numbers, capacity or None, source of the capacity, what it cannot do."""
    head, outputs = facts.head_parameters, classes or facts.head_outputs
    norm_source = norm_cannot = ""
    if not facts.norm_parameters:
        norm_cannot = "no norm layer; pass missing='insert' to add identity norms"
    else:
        norm_source = (
            "random_norm_network(target) expresses its target exactly (arXiv:2302.07937); about other weights, such as"
            " these, the theorem says nothing"
        )
        if others := sorted(set(facts.norm_kinds) - {BATCH_NORM}):
            norm_cannot = f"exact solving (express) needs BatchNorm, this network has {', '.join(others)}"
    linear = (
        f"a linear head fits any labels of at most {facts.head_inputs + 1:,} samples in general position (Cover 1965);"
        " of more samples, none can surely be changed"
    )
    sure = samples if samples <= facts.head_inputs + 1 else 0
    factors = facts.factored_parameters + head if facts.factored_parameters else 0
    unfactored = "no factored layer; predict with low-rank output or factorize the module first"
    updates = sum(min(rank, rows, columns) * (rows + columns) for rows, columns in facts.matrices[:-1])
    answers: list[tuple[str, int, int | None, str, str]] = [
        ("all", facts.parameters, None, _NO_THEORY, ""),
        ("norm_only", facts.norm_parameters + head, None, norm_source, norm_cannot),
        ("bias_only", facts.bias_parameters, None, _NO_THEORY, "" if facts.bias_parameters else "no bias"),
        ("head_only", head, sure, linear, ""),
        ("low_rank", factors, None, _NO_THEORY if factors else "", "" if factors else unfactored),
        ("low_rank_update", updates + head, None, _NO_THEORY, ""),
    ]
    for depth in (2, 3):
        hidden = hidden_widths(depth, changed=changed, samples=samples, outputs=outputs)
        numbers = sum((a + 1) * b for a, b in pairwise([facts.head_inputs, *hidden, outputs]))
        capacity = two_layer_capacity(hidden[0], samples) if depth == 2 else changed
        answers.append((f"additive (depth {depth})", numbers, capacity, SOURCE, ""))
    neurons, deep = two_layer_neurons(changed, samples), three_layer_neurons(changed)
    exact = f"exact, not trained: at most {neurons:,} neurons in 2 layers, {deep:,} per output in 3; {SOURCE}"
    numbers = changed * facts.head_inputs + neurons * (1 + outputs)
    return [*answers, ("patch", numbers, changed, exact, "changes the given labels alone; it does not generalise")]


def _recommend(rows: list[StrategyPlan], facts: NetworkFacts, samples: int, changed: int) -> tuple[str, str]:
    """Name of the strategy to try first, and why."""
    fits = {row.strategy for row in rows if "for training" not in row.cannot}
    if changed < samples and changed <= max(1, samples // 20):
        return "patch", f"only {changed:,} of {samples:,} labels change: exact, certified, and all others stay"
    if facts.factored_parameters and "low_rank" in fits:
        return "low_rank", "the network is factored already"
    if "all" in fits and samples >= 10_000 and rows[0].training_bytes <= 2 * 2**30:
        return "all", "enough samples, and the whole network fits in memory; norm_only is the cheap comparison"
    if facts.norm_parameters and "norm_only" in fits:
        return "norm_only", "few samples or little memory: about two numbers per channel, a delta of kilobytes"
    if "low_rank_update" in fits:
        return "low_rank_update", "no norm layers to tune; a low-rank change trains few numbers"
    return "head_only", "nothing else fits in the given memory"


def _size(count: int) -> str:
    """Bytes in the largest binary unit that they fill."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.0f} B" if units[0] == "B" else f"{size:.1f} {units[0]}"
