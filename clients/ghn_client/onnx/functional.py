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

_RENAMED = {("bernoulli_", "float"): ("bernoulli", "p"), ("normal_", "default"): ("normal_functional", "default")}
_SCATTERS: Mapping[Callable[..., object], Callable[..., object]] = {
    torch.ops.aten.slice.Tensor: torch.ops.aten.slice_scatter.default,
    torch.ops.aten.select.int: torch.ops.aten.select_scatter.default,
}
"""For each operator that shows a part, the one that puts such a part back."""


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
    groups = memory_groups(module.graph)
    fixed = constant_nodes(module.graph, groups, constants)
    filled = {storage_of(node) for node in module.graph.nodes if _is_inplace(node) and _reaches_others(node, groups)}
    folded = {node for storage in filled if groups[storage] <= fixed for node in groups[storage]}
    if folded and not compute_constants(module, folded, constants):
        raise NotFunctionalError("the constants of the program are too large to be computed while it is exported")
    for node in list(module.graph.nodes):
        if _is_inplace(node):
            _rewrite(module.graph, node, groups)
    _drop_unused(module.graph)


def _is_inplace(node: Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable and storage_of(node) != 0


def _reaches_others(node: Node, groups: Groups) -> bool:
    return any(not is_same_view(other, node) for other in _read_later(node, groups))


def _read_later(node: Node, groups: Groups) -> list[Node]:
    """Earlier nodes that show the memory which ``node`` changes, and are read after it."""
    later = _nodes_after(node)
    group = groups[storage_of(node)]
    return [other for other in group if other is not node and other not in later and not later.isdisjoint(other.users)]


def _rewrite(graph: Graph, node: Node, groups: Groups) -> None:
    """Replaces an in-place operator by its functional twin, and what is read later by what it has become."""
    view = node.args[0]
    node.target = _functional_twin(node)
    stale, later = _read_later(node, groups), _nodes_after(node)
    result = node
    while True:
        for other in [other for other in stale if is_same_view(other, result)]:
            other.replace_all_uses_with(result, delete_user_cb=lambda user: user in later)
        stale = [other for other in stale if not is_same_view(other, result)]
        if not stale:
            return
        scatter = _SCATTERS.get(view.target) if isinstance(view, Node) and callable(view.target) else None
        if scatter is None or not isinstance(view, Node) or not isinstance(view.args[0], Node):
            raise NotFunctionalError(f"{view} is changed, and {stale[0]} shows the same memory")
        base = view.args[0]
        with graph.inserting_after(result):
            result = graph.call_function(scatter, (base, result, *view.args[1:]), dict(view.kwargs))
        result.meta = dict(base.meta)
        groups[storage_of(base)].add(result)
        view = base


def _functional_twin(node: Node) -> torch._ops.OpOverload:
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    namespace, _, name = target._schema.name.partition("::")
    overload = target._overloadname
    name, overload = _RENAMED.get((name, overload), (name.removesuffix("_"), overload))
    twin = getattr(getattr(getattr(torch.ops, namespace), name, None), overload, None)
    if not isinstance(twin, torch._ops.OpOverload) or twin._schema.is_mutable:
        raise NotFunctionalError(f"{target} has no functional twin")
    return twin


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


# ---- which nodes show the same memory, by the storages that torch traced them with -----------------------------------

Groups = dict[int, set[Node]]
"""Nodes by their storage."""


def storage_of(node: Node) -> int:
    """Identifier of a node's storage; 0 if it is no tensor."""
    value = node.meta.get("val")
    return int(value.untyped_storage()._cdata) if isinstance(value, torch.Tensor) else 0


def memory_groups(graph: Graph) -> Groups:
    """The nodes of ``graph`` that are tensors, grouped by storage."""
    groups: Groups = defaultdict(set)
    for node in graph.nodes:
        if storage_of(node):
            groups[storage_of(node)].add(node)
    return groups


def is_same_view(node: Node, other: Node) -> bool:
    """Whether two nodes that share memory show the same elements in the same way."""
    first, second = node.meta["val"], other.meta["val"]
    return bool(
        first.dtype == second.dtype
        and first.shape == second.shape
        and first.stride() == second.stride()
        and first.storage_offset() == second.storage_offset()
    )


# ---- constants: what depends on neither inputs, weights nor chance ---------------------------------------------------

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
