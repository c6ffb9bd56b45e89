"""From the records of a trace to an ``ArchitectureGraph``: dead ends, squeezes, contraction, the head, attributes.

The steps and their order are those of ``ghn_service.graph`` for ONNX files, on far simpler input: no tied or lost
weights, no decomposed layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ghn_architectures.tracing.recorder import INPUT, Record, Recorder, Sources
from ghn_service.graph.architecture import ArchitectureGraph, BufferSpec, LayerAttributes, Node, ParameterSpec

_NORMS = ("bn", "ln")


def finish(recorder: Recorder, module: nn.Module, output: Sources) -> ArchitectureGraph:
    """The graph of ``module``, whose output comes from the records ``output``."""
    records = recorder.records
    remove_dead_ends(records, output)
    remove_squeezes(records)
    contract(records)
    head = find_head(records, output)
    order = [index for index, record in enumerate(records) if not record.removed and index not in head] + head
    readers = _readers(records, order)
    position = {index: place for place, index in enumerate(order)}
    edges = sorted((position[source], position[target]) for target in order for source in records[target].predecessors)
    nodes = tuple(_node(records, index, readers, is_head=index in head) for index in order)
    known = {spec.name for node in nodes for spec in node.parameters}
    others = tuple(_other_parameters(recorder, module, known))
    return ArchitectureGraph(nodes, tuple(edges), others, _buffers(module))


def remove_dead_ends(records: list[Record], output: Sources) -> None:
    """Drops records that the output does not depend on."""
    live = set(output) | {INPUT}
    waiting = list(live)
    while waiting:
        fresh = records[waiting.pop()].predecessors - live
        live |= fresh
        waiting.extend(fresh)
    for index, record in enumerate(records):
        if index not in live:
            record.removed = True
            record.predecessors = set()


def remove_squeezes(records: list[Record]) -> None:
    """Marks the global pools that only feed the gate of a squeeze-and-excitation block."""
    gates = [index for index, record in enumerate(records) if record.op_type == "cse" and not record.removed]
    if not gates:
        return
    successors = _readers(records, range(len(records)))
    for index in gates:
        branch = {index}
        waiting = sorted(records[index].gate - records[index].feature)
        while waiting:
            item = waiting.pop()
            if item in branch or item == INPUT or not branch.issuperset(successors.get(item, ())):
                continue
            branch.add(item)
            if records[item].op_type == "glob_avg":
                records[item].removed = True
            else:
                waiting.extend(records[item].predecessors)


def contract(records: list[Record]) -> None:
    """Takes removed records out of the wiring, and with them sums and concatenations left with one source."""
    for record in records:
        for index in [index for index in record.predecessors if records[index].removed]:
            record.predecessors.remove(index)
            record.predecessors |= records[index].predecessors
        if record.op_type in ("sum", "concat") and len(record.predecessors) < 2:
            record.removed = True


def find_head(records: list[Record], output: Sources) -> list[int]:
    """The classifier's weight and bias: the linear layer whose result is the output and goes nowhere else."""
    if len(output) != 1:
        return []
    (last,) = output
    first = last
    if records[last].op_type == "bias":
        (first,) = records[last].predecessors
    head = [first] if first == last else [first, last]
    weight = records[first].weight
    if weight is None or records[first].op_type != "conv" or len(weight.shape) != 2:
        return []
    is_read = any(set(head) & record.predecessors for index, record in enumerate(records) if index not in head)
    return [] if is_read else head


def _readers(records: list[Record], order: Iterable[int]) -> dict[int, list[int]]:
    readers: dict[int, list[int]] = {}
    for index in order:
        for item in records[index].predecessors:
            readers.setdefault(item, []).append(index)
    return readers


def _node(records: list[Record], index: int, readers: Mapping[int, list[int]], *, is_head: bool) -> Node:
    record = records[index]
    return Node(
        op_type=record.op_type,
        name=record.name,
        weight=record.weight,
        norm_bias=record.norm_bias,
        kernel_shape=record.kernel_shape,
        is_head=is_head,
        layer=_layer(records, index, record.attributes, readers) if record.attributes is not None else None,
    )


def _layer(
    records: list[Record], index: int, attributes: Mapping[str, Any], readers: Mapping[int, list[int]]
) -> LayerAttributes:
    activation, normalized = _what_follows(records, index, readers)
    packed = _packed(records, index, readers)
    return LayerAttributes(activation=activation, normalized=normalized, packed=packed, **attributes)


def _what_follows(records: list[Record], index: int, readers: Mapping[int, list[int]]) -> tuple[str, bool]:
    """The activation after a layer, seen through its bias, one norm and one sum, and whether a norm is between."""
    normalized = False
    sums = 0
    while True:
        record = records[index]
        normalized |= record.op_type in _NORMS
        if record.activation is not None:
            return record.activation[1], normalized
        following = readers.get(index, [])
        passing = [item for item in following if records[item].op_type in ("bias", "sum", *_NORMS)]
        if not passing or (len(following) > 1 and sums):
            return "", False
        index = min(passing, key=lambda item: (records[item].level, item))
        kind = records[index].op_type
        sums += kind == "sum"
        if sums > 1 or (kind in _NORMS and normalized):
            return "", False


def _packed(records: list[Record], index: int, readers: Mapping[int, list[int]]) -> int:
    """3 for a linear layer that alone feeds an attention with queries, keys and values."""
    record = records[index]
    end = record.bias if record.bias >= 0 else index
    for reader in readers.get(end, ()):
        is_only_source = records[reader].op_type == "msa" and records[reader].predecessors == {end}
        if is_only_source and record.weight is not None and len(record.weight.shape) == 2:
            return 3 if record.weight.shape[0] % 3 == 0 else 1
    return 1


def _other_parameters(recorder: Recorder, module: nn.Module, known: set[str]) -> Iterable[ParameterSpec]:
    for name, parameter in module.named_parameters():
        if name not in known:
            yield recorder.spec(parameter, recorder.fallbacks.get(name, "truncated_normal"))


def _buffers(module: nn.Module) -> tuple[BufferSpec, ...]:
    return tuple(
        BufferSpec(f"{prefix}.{name}" if prefix else name, tuple(buffer.shape), name)
        for prefix, child in module.named_modules()
        for name, buffer in child._buffers.items()
        if buffer is not None and name not in child._non_persistent_buffers_set and buffer.is_floating_point()
    )
