"""Makes an exported program free of in-place operators, without tracing it anew.

``ExportedProgram.run_decompositions`` does the same by a second trace, which takes longer than the export itself. Here
an in-place operator becomes its functional twin, and everything that shows the changed memory and is read later is
replaced: the same view by the result, the tensor that a slice was taken from by one with the slice put back. Groups of
constants that are filled through views (the window masks of Swin) are computed right away. The rest is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.fx import Graph, GraphModule, Node

from ghn_client.constant_folding import compute_constants, constant_nodes
from ghn_client.memory_groups import Groups, is_same_view, memory_groups, storage_of

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
