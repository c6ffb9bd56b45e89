"""How attention scales its logits, so that wider heads can be compensated.

Copied channels of queries and keys multiply their product by the number of copies, and the scale depends on the width
of a head. Both are made good by one gain on whatever writes queries and keys, as in HyperCloning (arXiv:2409.12903).
Whatever else reads them must undo it: a group of which an activation or an output sees the gain gets none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ghn_service.graph.onnx.file import OnnxNode
from ghn_service.transfer.axes import Dim
from ghn_service.transfer.network import Network
from ghn_service.transfer.operators import SHAPE_ONLY
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
        constants: The numbers in it: the value that is multiplied with one, and the number's name.
    """

    group: Dim
    factor: float | None
    constants: set[tuple[str, str]]


def attention_scales(network: Network) -> list[Scale]:
    """The scales of all products of two activations over channels."""
    found = []
    products: dict[str, Dim] = {}
    for node in network.file.nodes:
        axes = network.values[node.inputs[0]].axes if node.op_type == "MatMul" else None
        leaves = axes[-1].leaves() if axes else []
        if len(leaves) == 1 and "position" not in leaves[0].flags and len(network.data_inputs(node)) == 2:
            scale = Scale(leaves[0], 1.0, set())
            for name in node.inputs:
                _walk_back(network, name, scale)
            _walk_on(network, node.outputs[0], scale)
            found.append(scale)
            products[node.outputs[0]] = scale.group
    seen = set(_seen_groups(network, products))
    for scale in found:
        if scale.group in seen:
            scale.factor = None
    return found


def gains(target: list[Scale], source: list[Scale], of: dict[Dim, Dim]) -> dict[Dim, float]:
    """What queries and keys of each target group are multiplied with, so that the logits stay the source's."""
    known: dict[Dim, set[float | None]] = {}
    for scale in (*target, *source):
        known.setdefault(scale.group, set()).add(scale.factor)
    result: dict[Dim, float] = {}
    for group in dict.fromkeys(scale.group for scale in target):
        other = of.get(group)
        factors, wanted = known[group], known.get(other, set()) if other is not None else set()
        if len(factors) != 1 or len(wanted) != 1 or other is None or group.size % max(other.size, 1):
            continue
        (mine,), (theirs,) = factors, wanted
        if mine is not None and theirs is not None and mine * theirs > 0:
            result[group] = math.sqrt(theirs / (mine * (group.size // other.size)))
    return result


def _seen_groups(network: Network, products: dict[str, Dim]) -> Iterator[Dim]:
    """Groups that something sees of which a gain is not made good."""
    groups = set(products.values())
    for name in network.file.outputs if groups else ():
        yield from groups & _carried(network, name)
    for node in network.file.nodes if groups else ():
        names = network.data_inputs(node) if node.op_type not in SHAPE_ONLY | VIEWS else []
        for group in groups & {leaf for name in names for leaf in _carried(network, name)}:
            if products.get(node.outputs[0]) is not group and not _makes_good(network, node, group):
                yield group


def _carried(network: Network, name: str) -> set[Dim]:
    """The groups of a value."""
    value = network.values[name]
    return {leaf for item in (value, *value.pieces) for axis in item.axes or () for leaf in axis.leaves()}


def _makes_good(network: Network, node: OnnxNode, group: Dim) -> bool:
    """Whether an operator that reads a group with a gain writes it with the same gain, or without its group."""
    held = [name for name in node.inputs if group in _carried(network, name)]
    others = [network.values[name] for name in node.inputs if name and name not in held]
    weights = [network.values[name].tensor for name in held if not network.values[name].is_data]
    layer = network.makers.get(node.outputs[0])
    if node.op_type in ("Mul", "Div"):
        is_multiplied = node.op_type == "Mul" or held == node.inputs[:1]
        return len(held) == 1 and is_multiplied and all(value.number is not None for value in others)
    if node.op_type in ("Add", "Sub", "Sum", "Concat"):
        return not others and all(weight is not None and weight.kind == "parameter" for weight in weights)
    if node.op_type == "MatMul" and len(held) == 1 and all(value.is_data for value in others):
        return group in _carried(network, node.outputs[0])  # what attention gathers
    if layer is None:
        return False
    if layer.kind == "layer_norm":
        return all(group in tensor.leaves() for tensor in layer.tensors.values())
    contracted = [tensor.axes[axis] for tensor in layer.tensors.values() for axis in tensor.contracted]
    return any(group in axis.leaves() for axis in contracted)


def _walk_back(network: Network, name: str, scale: Scale) -> None:
    """From a query or key to the layer that makes it; only their product may read what is multiplied on the way."""
    is_alone = True
    while name not in network.makers:
        spend(COST_OF_HOP)
        node = network.file.producers.get(name)
        is_alone &= len(network.consumers[name]) == 1
        before = _multiply(network, name, scale)
        if before is None and node is not None and node.op_type in VIEWS:
            before = node.inputs[0]
        elif not is_alone:
            before = None
        if before is None:
            scale.factor = None
            return
        name = before


def _walk_on(network: Network, name: str, scale: Scale) -> None:
    """From the product on."""
    while len(readers := network.consumers.get(name, [])) == 1 and name not in network.file.outputs:
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
    scale.constants.add((name, constant))
    return data
