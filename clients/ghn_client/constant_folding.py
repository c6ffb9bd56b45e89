"""Computes the constants of an exported program: what depends on neither inputs, weights nor chance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from ghn_client.memory_groups import Groups, storage_of

MAX_CONSTANT_ELEMENTS = 1 << 22
"""Scalars of constants that may be computed here, all together."""

_LIKE = {"new_zeros": 0, "new_ones": 1, "zeros_like": 0, "ones_like": 1}


def constant_nodes(graph: Graph, groups: Groups, constants: Mapping[str, torch.Tensor]) -> set[Node]:
    """Nodes whose values depend on neither inputs, weights nor chance."""
    found = {node for node in graph.nodes if _may_be_constant(node, constants)}
    while True:
        tainted = {
            node
            for node in found
            if (not _makes_fresh_constant(node) and not set(node.all_input_nodes) <= found)
            or not groups.get(storage_of(node), {node}) <= found
        }
        if not tainted:
            return found
        found -= tainted


def _may_be_constant(node: Node, constants: Mapping[str, torch.Tensor]) -> bool:
    if node.op == "placeholder":
        return node.name in constants
    if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
        return False
    is_random = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags
    return not is_random


def _makes_fresh_constant(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name.partition("::")[2] in _LIKE


def compute_constants(module: GraphModule, wanted: set[Node], constants: Mapping[str, torch.Tensor]) -> bool:
    """Computes the nodes ``wanted`` and all that they need, and puts their values into the graph.

    Returns:
        Whether that was done; False, and nothing changed, if they are too large.
    """
    needed = _with_ancestors(wanted)
    if sum(_num_elements(node) for node in needed if storage_of(node)) > MAX_CONSTANT_ELEMENTS:
        return False
    values: dict[Node, Any] = {}
    for node in list(module.graph.nodes):
        if node not in needed:
            continue
        values[node] = constants[node.name] if node.op == "placeholder" else _evaluate(node, values)
    for node in [node for node in module.graph.nodes if node in needed and node.op != "placeholder"]:
        if any(user not in needed for user in node.users):
            _replace_by_value(module, node, values[node], needed)
    for node in reversed(list(module.graph.nodes)):
        if node in needed and node.op != "placeholder" and not node.users:
            module.graph.erase_node(node)
    return True


def _with_ancestors(nodes: set[Node]) -> set[Node]:
    found: set[Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(() if _makes_fresh_constant(node) else node.all_input_nodes)
    return found


def _num_elements(node: Node) -> int:
    return int(node.meta["val"].numel())


def _evaluate(node: Node, values: dict[Node, Any]) -> torch.Tensor:
    example = node.meta["val"]
    if _makes_fresh_constant(node):
        assert isinstance(node.target, torch._ops.OpOverload)
        fill = _LIKE[node.target._schema.name.partition("::")[2]]
        return torch.full(tuple(example.shape), fill, dtype=example.dtype)
    args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), lambda item: values[item])
    if "device" in kwargs:
        kwargs["device"] = torch.device("cpu")
    assert callable(node.target)
    result = node.target(*args, **kwargs)
    assert isinstance(result, torch.Tensor)
    return result


def _replace_by_value(module: GraphModule, node: Node, value: torch.Tensor, needed: set[Node]) -> None:
    name = f"constant_{node.name}"
    module.register_buffer(name, value.clone(), persistent=False)
    with module.graph.inserting_before(node):
        constant = module.graph.create_node("get_attr", name, name=name)
    constant.meta = {**node.meta, "val": getattr(module, name)}
    node.replace_all_uses_with(constant, delete_user_cb=lambda user: user not in needed)
