"""Which nodes of an exported program show the same memory, by the storages of the tensors that torch traced it with."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch.fx import Graph, Node

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
