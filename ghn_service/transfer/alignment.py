"""Which layer of the target stands where which layer of the source stands.

Units of both networks are aligned by monotone dynamic programming (as in DPIAT, arXiv:2212.13970), and so are the
layers inside two units. What the target has beyond the source is given weights with which it passes its input on: a
residual block whose branch ends in zeros, a plain layer with a Dirac kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from ghn_service.errors import LimitExceededError
from ghn_service.transfer.network import Layer, Network
from ghn_service.transfer.units import Unit, find_units, silenced_layers
from ghn_service.transfer.work import spend

_MAX_CELLS = 4_000_000
Mode = Literal["copy", "zero", "pass"]
"""How a layer gets its values: from the source's; zeros where it writes; passing its input on."""

_Item = TypeVar("_Item")
_Pair = tuple[int | None, int | None]


@dataclass(eq=False, slots=True)
class Alignment:
    """The result: pairs of layers, and what has no partner.

    Attributes:
        pairs: Target layer, source layer (None where its values follow from the architecture), and how.
        inserted: Units of the target that pass their input on.
        left_out: Layers of the source without a place.
        score: Share of the layers of both networks that is explained, weighted by sizes; 0 to 1.
    """

    pairs: list[tuple[Layer, Layer | None, Mode]] = field(default_factory=list)
    inserted: list[Unit] = field(default_factory=list)
    left_out: list[Layer] = field(default_factory=list)
    score: float = 0.0


def align(target: Network, source: Network) -> Alignment:
    """The best alignment of two networks.

    Raises:
        LimitExceededError: The networks are too long to compare.
    """
    count = min(len(target.outputs), len(source.outputs))
    mine, theirs = (find_units(network, network.outputs[:count]) for network in (target, source))
    silent = [silenced_layers(target, mine, i) for i in range(len(mine))]
    numbers: dict[object, int] = {}
    signatures = {id(unit): numbers.setdefault(unit.signature, len(numbers)) for unit in (*mine, *theirs)}
    kinds = {
        id(unit): numbers.setdefault((signatures[id(unit)], unit.activation), len(numbers)) for unit in (*mine, *theirs)
    }
    known: dict[tuple[int, int], float] = {}

    def similarity(a: Unit, b: Unit) -> float:
        key = kinds[id(a)], kinds[id(b)]
        if key not in known:
            known[key] = _unit_similarity(a, b)
        return known[key]

    lost = [[-0.3 * max(len(unit.layers), 0.1) for unit in units] for units in (mine, theirs)]
    mine_lost = [-0.01 if found is not None else gap for gap, found in zip(lost[0], silent, strict=True)]
    pairs = _best_pairs(mine, theirs, similarity, mine_lost, lost[1])
    result = Alignment()
    partners = {i: theirs[j] for i, j in pairs if i is not None and j is not None}
    for i, j in pairs:
        if i is not None and j is not None:
            _align_layers(result, mine[i], theirs[j])
        elif j is not None:
            result.left_out.extend(theirs[j].layers)
    for i, found in enumerate(silent):
        if i not in partners and found is not None:
            result.inserted.append(mine[i])
            spend(len(partners))
            alike = [j for j in partners if signatures[id(mine[j])] == signatures[id(mine[i])]]
            nearest = min(alike, key=lambda j: (abs(j - i), j), default=None)
            _insert(result, mine[i], found, None if nearest is None else partners[nearest])
    used = {id(layer) for unit in theirs for layer in unit.layers}
    result.left_out.extend(layer for layer in source.layers if id(layer) not in used)
    matched = sum(_overlap(a, b) for a, b, mode in result.pairs if b is not None and mode == "copy")
    result.score = min(2 * matched / max(len(target.layers) + len(source.layers), 1), 1.0)
    return result


def _best_pairs(
    left: Sequence[_Item],
    right: Sequence[_Item],
    similarity: Callable[[_Item, _Item], float],
    left_gaps: Sequence[float],
    right_gaps: Sequence[float],
) -> list[_Pair]:
    """Monotone pairs with the largest sum of similarities and gaps (Needleman-Wunsch); early pairs among equals."""
    rows, columns = len(left), len(right)
    if (rows + 1) * (columns + 1) > _MAX_CELLS:
        raise LimitExceededError(
            f"networks of {rows} and {columns} units cannot be aligned; at most {_MAX_CELLS} pairs are compared"
        )
    best = [0.0] * (columns + 1)
    step = [bytearray(columns + 1) for _ in range(rows + 1)]  # 2: both, 1: of the left alone, 0: of the right alone
    for i in range(rows, -1, -1):
        spend(columns + 1)
        below, best = best, [0.0] * (columns + 1)
        for j in range(columns, -1, -1):
            options = []
            if i < rows and j < columns and (value := similarity(left[i], right[j])) > 0:
                options.append((below[j + 1] + value, 2))
            if i < rows:
                options.append((below[j] + left_gaps[i], 1))
            if j < columns:
                options.append((best[j + 1] + right_gaps[j], 0))
            if options:
                best[j], step[i][j] = max(options, key=lambda option: (round(option[0], 9), option[1]))
    pairs: list[_Pair] = []
    i = j = 0
    while i < rows or j < columns:
        choice = step[i][j]
        pairs.append((i if choice else None, j if choice != 1 else None))
        i, j = i + (choice > 0), j + (choice != 1)
    return pairs


def _unit_similarity(a: Unit, b: Unit) -> float:
    if not a.layers or not b.layers:
        return 0.05 if a.kind == b.kind and not a.layers and not b.layers else 0.0
    if a.kind != b.kind and not {a.kind, b.kind} <= {"block", "region"}:
        return 0.0
    matched = sum(_layer_similarity(a.layers[i], layer) for i, layer in _layer_partners(a, b).items())
    score = matched / max(len(a.layers), len(b.layers)) * len(a.layers) ** 0.5
    score *= 1.0 if a.kind == b.kind else 0.5
    score *= 1.0 if a.activation == b.activation else 0.9
    score *= 1.0 if a.has_attention == b.has_attention else 0.2
    return float(score * (1.0 if a.scale == b.scale else 0.3))


def _layer_similarity(a: Layer, b: Layer) -> float:
    if a.kind != b.kind or len(a.placement) != len(b.placement) or a.is_depthwise != b.is_depthwise:
        return 0.0
    if a.kind != "conv":
        return 1.0 if a.rank == b.rank or a.kind == "linear" else 0.5
    score = 1.0 if (a.groups > 1) == (b.groups > 1) else 0.4
    for mine, theirs in zip(a.placement, b.placement, strict=True):
        score *= 1.0 if mine[1] == theirs[1] else 0.5
        score *= 1.0 if mine[0] == theirs[0] else 0.9 if min(mine[0], theirs[0]) > 1 else 0.6
    return score


def _layer_pairs(a: Unit, b: Unit) -> list[_Pair]:
    def similarity(x: Layer, y: Layer) -> float:
        return _layer_similarity(x, y) if (id(x) in a.shortcut) == (id(y) in b.shortcut) else 0.0

    return _best_pairs(a.layers, b.layers, similarity, [-0.1] * len(a.layers), [-0.1] * len(b.layers))


def _layer_partners(a: Unit, b: Unit) -> dict[int, Layer]:
    return {i: b.layers[j] for i, j in _layer_pairs(a, b) if i is not None and j is not None}


def _align_layers(result: Alignment, a: Unit, b: Unit) -> None:
    for i, j in _layer_pairs(a, b):
        if i is not None and j is not None:
            result.pairs.append((a.layers[i], b.layers[j], "copy"))
        elif j is not None:
            result.left_out.append(b.layers[j])


def _insert(result: Alignment, unit: Unit, silent: frozenset[int], twin: Unit | None) -> None:
    """Gives an inserted unit values: a block those of a matched neighbour of its kind, with a silent branch."""
    if unit.kind == "layer":
        result.pairs.extend((layer, None, "pass") for layer in unit.layers)
        return
    donors = _layer_partners(unit, twin) if twin is not None else {}
    for i, layer in enumerate(unit.layers):
        if id(layer) in silent:
            result.pairs.append((layer, donors.get(i), "zero"))
        elif i in donors:
            result.pairs.append((layer, donors[i], "copy"))


def _overlap(a: Layer, b: Layer) -> float:
    """Share of the larger of two layers' sizes that both have, per axis, averaged geometrically."""
    one, other = a.tensors.get("weight"), b.tensors.get("weight")
    if one is None or other is None or len(one.shape) != len(other.shape):
        return 0.5
    ratio = math.prod(min(x, y) / max(x, y) for x, y in zip(one.shape, other.shape, strict=True))
    return float(ratio ** (1 / max(len(one.shape), 1)))
