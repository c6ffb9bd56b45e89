"""Makes an exported program free of in-place operators, without tracing it anew.

``ExportedProgram.run_decompositions`` does the same by a second trace, which takes longer than the export itself. Here
an in-place operator becomes its functional twin where no other live value shares its memory, and a group of constants
that are filled through views (the window masks of Swin) is computed right away. Everything else is refused.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

MAX_CONSTANT_ELEMENTS = 1 << 22
"""Scalars of constants that may be computed here, all together."""

_RENAMED = {("bernoulli_", "float"): ("bernoulli", "p"), ("normal_", "default"): ("normal_functional", "default")}
_LIKE = {"new_zeros": 0, "new_ones": 1, "zeros_like": 0, "ones_like": 1}


class NotFunctionalError(Exception):
    """The program changes memory in a way that is not rewritten here."""


def make_functional(module: GraphModule, constants: dict[str, torch.Tensor]) -> None:
    """Rewrites the graph of ``module`` in place.

    Args:
        module: Graph of an exported program; every node's ``meta["val"]`` tells its shape, type and storage.
        constants: Values of the placeholders that are constants, by node name.

    Raises:
        NotFunctionalError: A mutation reaches a value that is still needed and is not a constant.
    """
    nodes = list(module.graph.nodes)
    position = {node: index for index, node in enumerate(nodes)}
    aliases = _alias_groups(nodes)
    constant_nodes = _constant_nodes(nodes, aliases, constants)
    unsound: set[int] = set()
    for node in nodes:
        if not _is_inplace(node):
            continue
        earlier = [other for other in aliases[_storage(node)] if position[other] < position[node]]
        others = [other for other in earlier if not _is_same_view(other, node)]
        if any(position[user] > position[node] for other in others for user in other.users):
            unsound.add(_storage(node))
    for storage in unsound:
        if not aliases[storage] <= constant_nodes:
            raise NotFunctionalError(f"{next(iter(aliases[storage]))} is changed through a view")
    if unsound:
        _compute_constants(module, {node for key in unsound for node in aliases[key]}, constants)
    for node in list(module.graph.nodes):
        if _is_inplace(node):
            _rewrite(node, [other for other in aliases[_storage(node)] if _is_same_view(other, node)])
    _drop_unused(module.graph)


def _storage(node: Node) -> int:
    value = node.meta.get("val")
    return int(value.untyped_storage()._cdata) if isinstance(value, torch.Tensor) else 0


def _alias_groups(nodes: list[Node]) -> dict[int, set[Node]]:
    groups: dict[int, set[Node]] = defaultdict(set)
    for node in nodes:
        if _storage(node):
            groups[_storage(node)].add(node)
    return groups


def _is_same_view(node: Node, other: Node) -> bool:
    """Whether two nodes that share memory show the same elements in the same way."""
    first, second = node.meta["val"], other.meta["val"]
    return bool(
        first.dtype == second.dtype
        and first.shape == second.shape
        and first.stride() == second.stride()
        and first.storage_offset() == second.storage_offset()
    )


def _is_inplace(node: Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable and _storage(node) != 0


def _rewrite(node: Node, same_views: list[Node]) -> None:
    """Replaces an in-place operator by its functional twin, and later readers of the changed value by its result."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    namespace, _, name = target._schema.name.partition("::")
    overload = target._overloadname
    name, overload = _RENAMED.get((name, overload), (name.removesuffix("_"), overload))
    twin = getattr(getattr(getattr(torch.ops, namespace), name, None), overload, None)
    if not isinstance(twin, torch._ops.OpOverload) or twin._schema.is_mutable:
        raise NotFunctionalError(f"{target} has no functional twin")
    node.target = twin
    later = _nodes_after(node)
    for changed in same_views:
        if changed is not node and changed not in later:
            changed.replace_all_uses_with(node, delete_user_cb=lambda user: user in later)


def _nodes_after(node: Node) -> set[Node]:
    found = set()
    following = node.next
    while following.op != "root":
        found.add(following)
        following = following.next
    return found


def _drop_unused(graph: Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users:
            graph.erase_node(node)


# ---- constants ------------------------------------------------------------------------------------------------------


def _constant_nodes(nodes: list[Node], aliases: dict[int, set[Node]], constants: dict[str, torch.Tensor]) -> set[Node]:
    """Nodes whose values depend on neither inputs, weights nor chance."""
    found = {node for node in nodes if _may_be_constant(node, constants)}
    while True:
        tainted = {
            node
            for node in found
            if (not _makes_fresh_constant(node) and not set(node.all_input_nodes) <= found)
            or not aliases.get(_storage(node), {node}) <= found
        }
        if not tainted:
            return found
        found -= tainted


def _may_be_constant(node: Node, constants: dict[str, torch.Tensor]) -> bool:
    if node.op == "placeholder":
        return node.name in constants
    if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
        return False
    is_random = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags
    return not is_random


def _makes_fresh_constant(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name.partition("::")[2] in _LIKE


def _compute_constants(module: GraphModule, wanted: set[Node], constants: dict[str, torch.Tensor]) -> None:
    """Computes the nodes ``wanted`` and all that they need, and puts their values into the graph."""
    needed = _with_ancestors(wanted)
    if sum(_num_elements(node) for node in needed if _storage(node)) > MAX_CONSTANT_ELEMENTS:
        raise NotFunctionalError("the constants of the program are too large to be computed while it is exported")
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
