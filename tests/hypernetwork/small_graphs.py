"""Small architectures and hypernetworks for tests."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from ghn_service.graph.architecture import ArchitectureGraph, Node, ParameterSpec
from ghn_service.hypernetwork.config import GHNConfig
from ghn_service.hypernetwork.ghn import GraphHyperNetwork

SMALL = GHNConfig(hidden_channels=16, num_layers=2, num_heads=4, max_shape=(8, 8, 5, 5), num_classes=10, rank=6)
CONFIGS = {
    "ghn3": SMALL,
    "ghn2": dataclasses.replace(SMALL, encoder="gated_gnn", kernel_crop="corner"),
    "logah": dataclasses.replace(SMALL, decoder="low_rank", max_shape=(32, 32, 5, 5)),
}


def small_ghn(config: GHNConfig = SMALL, seed: int = 0) -> GraphHyperNetwork:
    """A hypernetwork whose every parameter matters: its last layers are not shrunk."""
    ghn = GraphHyperNetwork(config, generator=torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in ghn.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return ghn


def chain(*nodes: Node) -> ArchitectureGraph:
    """An architecture without branches; the input comes first."""
    all_nodes = (Node("input"), *nodes)
    return ArchitectureGraph(all_nodes, tuple((index, index + 1) for index in range(len(nodes))))


def conv(name: str, *shape: int, op_type: str = "conv", is_head: bool = False) -> Node:
    return Node(op_type, name, weight=ParameterSpec(name, shape), is_head=is_head)


def bias(name: str, size: int, *, is_head: bool = False) -> Node:
    return Node("bias", name, weight=ParameterSpec(name, (size,)), is_head=is_head)


def norm(name: str, size: int, op_type: str = "bn") -> Node:
    weight = ParameterSpec(f"{name}.weight", (size,))
    return Node(op_type, name, weight=weight, norm_bias=ParameterSpec(f"{name}.bias", (size,), fallback="zeros"))


def small_network(width: int = 6) -> ArchitectureGraph:
    """A residual network with every kind of target; wider than 8 it is tiled by ``SMALL``."""
    nodes = (
        Node("input"),
        conv("stem", width, 3, 3, 3),
        norm("stem_norm", width),
        Node("max_pool", "pool", kernel_shape=(2, 2)),
        conv("depthwise", width, 1, 5, 5, op_type="sep_conv"),
        bias("depthwise_bias", width),
        Node("sum", "add"),
        conv("row", 2 * width, width, 1, 3),
        norm("row_norm", 2 * width, "ln"),
        conv("positions", 1, 17, 2 * width, op_type="pos_enc"),
        Node("sum", "add_positions"),
        Node("glob_avg", "squeeze"),
        conv("head.weight", 10, 2 * width, is_head=True),
        bias("head.bias", 10, is_head=True),
    )
    edges = ((0, 1), (1, 2), (2, 3), (2, 6), (3, 4), (4, 5), (5, 6), (6, 7), (7, 8), (8, 10), (9, 10), (10, 11))
    others = (ParameterSpec("class_token", (1, 1, 2 * width), fallback="truncated_normal"),)
    return ArchitectureGraph(nodes, (*edges, (11, 12), (12, 13)), others)


def random_network(seed: int, num_nodes: int = 24) -> ArchitectureGraph:
    """A random acyclic graph of convolutions, sums and norms."""
    generator = np.random.default_rng(seed)
    nodes = [Node("input")]
    edges = set()
    for index in range(1, num_nodes):
        kind = generator.integers(3)
        size = int(generator.integers(1, 12))
        if kind == 0:
            nodes.append(conv(f"w{index}", size, int(generator.integers(1, 12)), 3, 3))
        elif kind == 1:
            nodes.append(norm(f"n{index}", size))
        else:
            nodes.append(Node("sum"))
        for source in generator.choice(index, size=min(index, int(generator.integers(1, 4))), replace=False):
            edges.add((int(source), index))
    return ArchitectureGraph(tuple(nodes), tuple(sorted(edges)))
