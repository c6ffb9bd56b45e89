"""Builds ``ArchitectureGraph`` values from the reference data in ``shared/golden``, and checks fingerprints."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ghn_service.graph.architecture import ArchitectureGraph, Node, ParameterSpec
from tests.shared_data import shared_path

GOLDEN_MODELS = (
    "resnet18",
    "resnet50",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "convnext_tiny",
    "vit_b_16",
    "swin_t",
    "densenet121",
    "squeezenet1_1",
    "regnet_y_400mf",
    "vgg11_bn",
    "googlenet",
    "shufflenet_v2_x0_5",
)
GOLDEN_CIFAR_MODELS = ("resnet18_cifar10", "resnet50_cifar10")


@functools.lru_cache(maxsize=2)
def load_golden(model: str) -> dict[str, Any]:
    """The reference record of a model."""
    record: dict[str, Any] = json.loads(shared_path(f"golden/{model}.json").read_text())
    return record


def golden_distances(record: Mapping[str, Any]) -> np.ndarray:
    """The reference's distance matrix."""
    with np.load(shared_path(f"golden/{record['ve']['file']}")) as arrays:
        return arrays[record["ve"]["key"]]


def golden_graph(record: Mapping[str, Any]) -> ArchitectureGraph:
    """The reference's graph as our value, in the reference's node order."""
    state = record["state"]
    nodes = tuple(_node(item, state) for item in record["nodes"])
    named = {spec.name for node in nodes for spec in node.parameters}
    others = tuple(ParameterSpec(name, tuple(shape)) for name, shape in state.items() if name not in named)
    edges = tuple(sorted((source, target) for source, target in record["edges"]))
    return ArchitectureGraph(nodes, edges, others)


def permuted(graph: ArchitectureGraph, seed: int) -> ArchitectureGraph:
    """The same graph in a random valid topological order, the input first."""
    generator = np.random.default_rng(seed)
    waiting = [0] * graph.num_nodes
    successors: list[list[int]] = [[] for _ in graph.nodes]
    for source, target in graph.edges:
        waiting[target] += 1
        successors[source].append(target)
    ready = [index for index, count in enumerate(waiting) if count == 0]
    order: list[int] = []
    while ready:
        index = 0 if not order else ready[generator.integers(len(ready))]
        ready.remove(index)
        order.append(index)
        for target in successors[index]:
            waiting[target] -= 1
            if waiting[target] == 0:
                ready.append(target)
    place = {node: position for position, node in enumerate(order)}
    edges = tuple(sorted((place[source], place[target]) for source, target in graph.edges))
    return ArchitectureGraph(tuple(graph.nodes[index] for index in order), edges, graph.other_parameters)


def fingerprint_deviation(expected: Mapping[str, Any], values: torch.Tensor) -> float:
    """Largest difference of a tensor from its fingerprint, in units of the tensor's rms.

    Sums are compared per element, so that all parts of the fingerprint have the same scale.
    """
    if "slice" in expected:
        values = values[:, 1:]
    flat = values.reshape(-1)
    count = flat.numel()
    rms = expected["l2"] / math.sqrt(count)
    indices = [(k * 2654435761 + 12345) % count for k in range(16)]
    picked = flat[indices].double() - torch.tensor(expected["values"], dtype=torch.float64)
    found = {
        "sum": float(flat.sum(dtype=torch.float64)),
        "abs_sum": float(torch.linalg.vector_norm(flat, 1, dtype=torch.float64)),
        "l2": float(torch.linalg.vector_norm(flat, 2, dtype=torch.float64)),
    }
    differences = [
        float(picked.abs().max()),
        abs(found["sum"] - expected["sum"]) / count,
        abs(found["abs_sum"] - expected["abs_sum"]) / count,
        abs(found["l2"] - expected["l2"]) / math.sqrt(count),
    ]
    return max(differences) / rms


def _node(item: Mapping[str, Any], state: Mapping[str, list[int]]) -> Node:
    name = item["param"]
    is_head = bool(item["last_weight"] or item["last_bias"])
    if name is None:
        kernel = tuple(item["shape"][2:]) if item["shape"] else None
        return Node(item["type"], item["op"] or "", kernel_shape=kernel, is_head=is_head)
    weight = ParameterSpec(name, tuple(state[name]))
    norm_bias = None
    if item["type"] in ("bn", "ln"):
        bias_name = name.removesuffix("weight") + "bias"
        norm_bias = ParameterSpec(bias_name, tuple(state[bias_name]))
    return Node(item["type"], name, weight=weight, norm_bias=norm_bias, is_head=is_head)
