"""How attention scales its logits, so that wider heads can be compensated.

Copied channels of queries and keys multiply their product by the number of copies, and the scale depends on the width
of a head. Both are made good by one gain on whatever writes queries and keys, as in HyperCloning (arXiv:2409.12903).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ghn_service.transfer.axes import Dim
from ghn_service.transfer.network import Network

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
    outputs = {layer.output for layer in network.layers}
    for node in network.file.nodes:
        if node.op_type != "MatMul" or not all(network.values[name].is_data for name in node.inputs):
            continue
        axes = network.values[node.inputs[0]].axes
        leaves = axes[-1].leaves() if axes else []
        if len(leaves) != 1 or "position" in leaves[0].flags:
            continue
        scale = Scale(leaves[0], 1.0, set())
        for name in node.inputs:
            _walk_back(network, name, outputs, scale)
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


def _apply(network: Network, name: str, scale: Scale) -> str | None:
    """Takes a multiplication with a number into account; the value that was multiplied, or None if it was none."""
    node = network.file.producers[name]
    numbers = [(item, network.values[item].number) for item in node.inputs]
    data = [item for item, number in numbers if number is None]
    if node.op_type not in ("Mul", "Div") or len(numbers) != 2 or len(data) != 1:
        return None
    constant, number = next((item, number) for item, number in numbers if number is not None)
    if number is None or number == 0 or (node.op_type == "Div" and data[0] != node.inputs[0]):
        return None
    if scale.factor is not None:
        scale.factor = scale.factor * number if node.op_type == "Mul" else scale.factor / number
    scale.constants.add(constant)
    return data[0]


def _walk_back(network: Network, name: str, outputs: set[str], scale: Scale) -> None:
    while name not in outputs:
        node = network.file.producers.get(name)
        if node is None:
            scale.factor = None
            return
        before = _apply(network, name, scale)
        if before is not None:
            name = before
        elif node.op_type in VIEWS:
            name = node.inputs[0]
        else:
            scale.factor = None
            return


def _walk_on(network: Network, name: str, scale: Scale) -> None:
    while len(readers := network.consumers.get(name, [])) == 1:
        node = network.file.nodes[readers[0]]
        if node.op_type in ("Mul", "Div"):
            if _apply(network, node.outputs[0], scale) is None:
                return
        elif node.op_type not in VIEWS:
            return
        name = node.outputs[0]
