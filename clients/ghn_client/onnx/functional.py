"""Makes an exported program free of in-place operators, without tracing it anew.

``ExportedProgram.run_decompositions`` does the same by a second trace, which takes longer than the export itself. Here
an in-place operator becomes its functional twin, and everything that shows the changed memory and is read later is
replaced: the same view by the result, the tensor that a slice was taken from by one with the slice put back. Groups of
constants that are filled through views (the window masks of Swin) are computed right away. The rest is refused.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

MAX_CONSTANT_ELEMENTS = 1 << 22
"""Scalars of constants that may be computed here, all together."""

_LIKE = {"new_zeros": 0, "new_ones": 1, "zeros_like": 0, "ones_like": 1}
_RENAMED = {("bernoulli_", "float"): ("bernoulli", "p"), ("normal_", "default"): ("normal_functional", "default")}
_SCATTERS: Mapping[Callable[..., object], Callable[..., object]] = {
    torch.ops.aten.slice.Tensor: torch.ops.aten.slice_scatter.default,
    torch.ops.aten.select.int: torch.ops.aten.select_scatter.default,
}
"""For each operator that shows a part, the one that puts such a part back."""

Groups = dict[int, set[Node]]
"""Nodes that show the same memory, by the storage that torch traced them with."""


class NotFunctionalError(Exception):
    """The program changes memory in a way that is not rewritten here."""


def make_functional(module: GraphModule, constants: dict[str, torch.Tensor]) -> None:
    """Rewrites the graph of ``module`` in place.

    Args:
        module: Graph of an exported program; every node's ``meta["val"]`` tells its shape, type and storage.
        constants: Values of the placeholders that are constants, by node name.

    Raises:
        NotFunctionalError: A change reaches a value that is read later and cannot be rebuilt.
    """
    graph = module.graph
    groups: Groups = defaultdict(set)
    for node in graph.nodes:
        if _storage(node):
            groups[_storage(node)].add(node)
    inplace = [node for node in graph.nodes if _is_inplace(node)]
    filled = {_storage(node) for node in inplace if any(not _same_view(x, node) for x in _read_later(node, groups))}
    if filled:
        fixed = _constant_nodes(graph, groups, constants)
        folded = {node for storage in filled if groups[storage] <= fixed for node in groups[storage]}
        _compute_constants(module, folded, constants)
    for node in list(graph.nodes):
        if _is_inplace(node):
            _rewrite(graph, node, groups)
    for node in reversed(list(graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users:
            graph.erase_node(node)


def _storage(node: Node) -> int:
    """Identifier of a node's storage; 0 if it is no tensor."""
    value = node.meta.get("val")
    return int(value.untyped_storage()._cdata) if isinstance(value, torch.Tensor) else 0


def _same_view(node: Node, other: Node) -> bool:
    """Whether two nodes that share memory show the same elements in the same way."""
    views = [node.meta["val"], other.meta["val"]]
    first, second = ((x.dtype, x.shape, x.stride(), x.storage_offset()) for x in views)
    return first == second


def _is_inplace(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable and _storage(node) != 0


def _nodes_after(node: Node) -> set[Node]:
    found = set()
    while (node := node.next).op != "root":
        found.add(node)
    return found


def _read_later(node: Node, groups: Groups) -> list[Node]:
    """Earlier nodes that show the memory which ``node`` changes, and are read after it."""
    later = _nodes_after(node)
    group = groups[_storage(node)]
    return [other for other in group if other is not node and other not in later and not later.isdisjoint(other.users)]


def _rewrite(graph: Graph, node: Node, groups: Groups) -> None:
    """Replaces an in-place operator by its functional twin, and what is read later by what it has become."""
    assert isinstance(node.target, torch._ops.OpOverload)
    namespace, _, name = node.target._schema.name.partition("::")
    overload = node.target._overloadname
    name, overload = _RENAMED.get((name, overload), (name.removesuffix("_"), overload))
    twin = getattr(getattr(getattr(torch.ops, namespace), name, None), overload, None)
    if not isinstance(twin, torch._ops.OpOverload) or twin._schema.is_mutable:
        raise NotFunctionalError(f"{node.target} has no functional twin")
    view, result, node.target = node.args[0], node, twin
    stale, later = _read_later(node, groups), _nodes_after(node)
    while True:
        for other in [other for other in stale if _same_view(other, result)]:
            other.replace_all_uses_with(result, delete_user_cb=lambda user: user in later)
            stale.remove(other)
        if not stale:
            return
        scatter = _SCATTERS.get(view.target) if isinstance(view, Node) and callable(view.target) else None
        if scatter is None or not isinstance(view, Node) or not isinstance(view.args[0], Node):
            raise NotFunctionalError(f"{view} is changed, and {stale[0]} shows the same memory")
        base = view.args[0]
        with graph.inserting_after(result):
            result = graph.call_function(scatter, (base, result, *view.args[1:]), dict(view.kwargs))
        result.meta = dict(base.meta)
        groups[_storage(base)].add(result)
        view = base


# ---- constants: what depends on neither inputs, weights nor chance ---------------------------------------------------


def _constant_nodes(graph: Graph, groups: Groups, constants: Mapping[str, torch.Tensor]) -> set[Node]:
    found = {node for node in graph.nodes if node.op == "placeholder" and node.name in constants}
    for node in graph.nodes:
        is_operator = isinstance(node.target, torch._ops.OpOverload)
        is_random = is_operator and torch.Tag.nondeterministic_seeded in node.target.tags
        if node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor) and not is_random:
            found.add(node)
    while True:  # what reads, or shows the memory of, something else is none
        tainted = {
            node
            for node in found
            if not groups.get(_storage(node), {node}) <= found or not set(_read_values(node)) <= found
        }
        if not tainted:
            return found
        found -= tainted


def _fill_value(node: Node) -> int | None:
    """What an operator fills a new tensor with that takes no more than a shape from its input."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    return _LIKE.get(node.target._schema.name.partition("::")[2])


def _read_values(node: Node) -> list[Node]:
    return node.all_input_nodes if _fill_value(node) is None else []


def _compute_constants(module: GraphModule, wanted: set[Node], constants: Mapping[str, torch.Tensor]) -> None:
    """Computes the nodes ``wanted`` and all that they need, and puts their values into the graph."""
    needed, stack = set[Node](), list(wanted)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(_read_values(node))
    if sum(node.meta["val"].numel() for node in needed if _storage(node)) > MAX_CONSTANT_ELEMENTS:
        raise NotFunctionalError("the constants of the program are too large to be computed while it is exported")
    values: dict[Node, Any] = {}
    for node in (order := [node for node in module.graph.nodes if node in needed]):
        values[node] = constants[node.name] if node.op == "placeholder" else _evaluate(node, values)
    for node in order:  # now that all is computed, what is filled in place has its last value
        if node.op != "placeholder" and any(user not in needed for user in node.users):
            name = f"constant_{node.name}"
            module.register_buffer(name, values[node].clone(), persistent=False)
            with module.graph.inserting_before(node):
                constant = module.graph.create_node("get_attr", name, name=name)
            constant.meta = {**node.meta, "val": getattr(module, name)}
            node.replace_all_uses_with(constant, delete_user_cb=lambda user: user not in needed)
    for node in reversed(order):
        if node.op != "placeholder" and not node.users:
            module.graph.erase_node(node)


def _evaluate(node: Node, values: dict[Node, Any]) -> torch.Tensor:
    fill, example = _fill_value(node), node.meta["val"]
    if fill is not None:
        return torch.full(tuple(example.shape), fill, dtype=example.dtype)
    args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), lambda item: values[item])
    if "device" in kwargs:
        kwargs["device"] = torch.device("cpu")
    assert callable(node.target)
    result = node.target(*args, **kwargs)
    assert isinstance(result, torch.Tensor)
    return result
