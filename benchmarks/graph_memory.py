"""Memory and CPU seconds that a transformer over the nodes of an architecture takes, by its number of nodes.

``python -m benchmarks.graph_memory`` encodes chains of convolutions with one-layer hypernetworks of the heads that the
published ones have. Memory is that of one layer, whatever their number; the seconds are per layer.
"""

from __future__ import annotations

import time

import torch

from benchmarks.measure import MIB, PeakMemory, print_table
from ghn_service.graph.architecture import ArchitectureGraph, Node, ParameterSpec
from ghn_service.hypernetwork.config import GHNConfig
from ghn_service.hypernetwork.features import build_features, collate
from ghn_service.hypernetwork.ghn import GraphHyperNetwork

HEADS = (8, 16)
NUM_NODES = (1_000, 2_000, 4_000)
WARM_UP_NODES = 100
CHANNELS = 128


def chain_of_convolutions(num_nodes: int) -> ArchitectureGraph:
    """A network without branches, its input included."""
    names = [f"layer{index}" for index in range(1, num_nodes)]
    layers = [Node("conv", name, weight=ParameterSpec(name, (16, 16, 3, 3))) for name in names]
    edges = tuple((index, index + 1) for index in range(len(layers)))
    return ArchitectureGraph((Node("input"), *layers), edges)


def measure(num_heads: int, num_nodes: int) -> tuple[int, float]:
    """Bytes by which the process grows while it encodes, and its CPU seconds."""
    config = GHNConfig(hidden_channels=CHANNELS, num_layers=1, num_heads=num_heads, max_shape=(8, 8, 3, 3))
    ghn = GraphHyperNetwork(config, generator=torch.Generator().manual_seed(0)).eval()
    graph = chain_of_convolutions(num_nodes)
    memory = PeakMemory()
    memory.reset()
    start = time.process_time()
    with torch.inference_mode():
        ghn.encode(collate([build_features(graph, config)]))
    return memory.grown_bytes(), time.process_time() - start


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    rows = []
    for num_heads in HEADS:
        measure(num_heads, WARM_UP_NODES)
        for num_nodes in NUM_NODES:
            grown_bytes, seconds = measure(num_heads, num_nodes)
            per_pair = f"{grown_bytes / num_nodes**2:.0f}"
            rows.append([str(num_heads), str(num_nodes), f"{grown_bytes / MIB:.0f}", per_pair, f"{seconds:.2f}"])
    print_table(["heads", "nodes", "MiB", "bytes per pair", "CPU seconds per layer"], rows)


if __name__ == "__main__":
    main()
