"""How attention scales its logits, so that wider heads can be compensated.

Copied channels of queries and keys multiply their product by the number of copies, and the scale depends on the width
of a head. Both are made good by one gain on whatever writes queries and keys, as in HyperCloning (arXiv:2409.12903).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ghn_service.transfer.axes import Dim
from ghn_service.transfer.network import Network
from ghn_service.transfer.work import spend

COST_OF_HOP = 16

VIEWS = frozenset(
    {"Identity", "Cast", "CastLike", "Dropout", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Gather", "Split",
     "SequenceAt", "SplitToSequence", "Slice", "Expand"}
)  # fmt: skip


@dataclass(eq=False, slots=True)
class Scale:
    """The factor between the product of queries and keys and what the softmax sees.

    Attributes:
        group: Channels that are summed over.
        factor: None where it could not be told.
        constants: Names of the numbers in it.
    """

    group: Dim
    factor: float | None
    constants: set[str]


def attention_scales(network: Network) -> list[Scale]:
    """The scales of all products of two activations over channels."""
    found = []
    for node in network.file.nodes:
        axes = network.values[node.inputs[0]].axes if node.op_type == "MatMul" else None
        leaves = axes[-1].leaves() if axes else []
        if len(leaves) == 1 and "position" not in leaves[0].flags and len(network.data_inputs(node)) == 2:
            scale = Scale(leaves[0], 1.0, set())
            for name in node.inputs:
                _walk_back(network, name, scale)
            _walk_on(network, node.outputs[0], scale)
            found.append(scale)
    return found


def gains(target: list[Scale], source: list[Scale], of: dict[Dim, Dim]) -> dict[Dim, float]:
    """What queries and keys of each target group are multiplied with, so that the logits stay the source's."""
    known: dict[Dim, set[float | None]] = {}
    for scale in source:
        known.setdefault(scale.group, set()).add(scale.factor)
    result: dict[Dim, float] = {}
    for scale in target:
        other = of.get(scale.group)
        factors = known.get(other, set()) if other is not None else set()
        if len(factors) != 1 or other is None or scale.group.size % max(other.size, 1):
            continue
        (factor,) = factors
        if factor is not None and scale.factor is not None and factor * scale.factor > 0:
            copies = scale.group.size // other.size
            result[scale.group] = math.sqrt(factor / (scale.factor * copies))
    return result


def _walk_back(network: Network, name: str, scale: Scale) -> None:
    """From a query or key to the layer that makes it."""
    while name not in network.makers:
        spend(COST_OF_HOP)
        node = network.file.producers.get(name)
        before = _multiply(network, name, scale)
        if before is None and node is not None and node.op_type in VIEWS:
            before = node.inputs[0]
        if before is None:
            scale.factor = None
            return
        name = before


def _walk_on(network: Network, name: str, scale: Scale) -> None:
    """From the product on."""
    while len(readers := network.consumers.get(name, [])) == 1:
        spend(COST_OF_HOP)
        node = network.file.nodes[readers[0]]
        name = node.outputs[0]
        if node.op_type not in VIEWS and _multiply(network, name, scale) is None:
            return


def _multiply(network: Network, name: str, scale: Scale) -> str | None:
    """Takes a multiplication with a number into account; the value that was multiplied, or None if it was none."""
    node = network.file.producers.get(name)
    if node is None or node.op_type not in ("Mul", "Div") or len(node.inputs) != 2:
        return None
    data, constant = sorted(node.inputs, key=lambda item: network.values[item].number is not None)
    number, other = network.values[constant].number, network.values[data].number
    if not number or other is not None or (node.op_type == "Div" and data != node.inputs[0]):
        return None
    if scale.factor is not None:
        scale.factor = scale.factor * number if node.op_type == "Mul" else scale.factor / number
    scale.constants.add(constant)
    return data
