"""Every torchvision classifier has as many nodes, edges and connected pairs as in the reference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ghn_service.graph.architecture import shortest_distances
from ghn_service.graph.onnx.reader import read_onnx
from tests.data.regenerate import stored_model
from tests.zoo_support import build_torchvision, export

# Nodes, edges, pairs with a distance: `tests/data/reference_counts.json`, from the reference's own runs.
COUNTS: dict[str, list[int]] = json.loads((Path(__file__).parents[1] / "data" / "reference_counts.json").read_text())
# Ill-formed in the reference (cycles; an orphaned head): we build the sensible graph, see docs/hypernetworks.md.
ILL_FORMED = {"swin_v2_t": [206, 241, 17647], "swin_v2_s": None, "swin_v2_b": None, "maxvit_t": [451, 516, 90515]}
# Their initialisation or their integer buffers need real memory.
NEEDS_MEMORY = ("regnet", "swin", "maxvit")
STORED = ("resnet18", "mobilenet_v3_small", "efficientnet_b0", "densenet121", "vit_b_16", "swin_t", "squeezenet1_1")


def counts(data: bytes) -> list[int]:
    graph = read_onnx(data)
    return [graph.num_nodes, len(graph.edges), int((shortest_distances(graph) > 0).sum())]


@pytest.mark.parametrize("name", STORED)
def test_stored_networks(name: str) -> None:
    assert counts(stored_model(name, "script-eval")) == COUNTS[name]


@pytest.mark.zoo
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", COUNTS)
def test_all_classifiers(name: str) -> None:
    expected = ILL_FORMED.get(name, COUNTS[name])
    if expected is None:
        pytest.skip("ill-formed in the reference, and no counts of our own are recorded")
    with torch.device("cpu" if name.startswith(NEEDS_MEMORY) else "meta"):
        module, example = build_torchvision(name)
    assert counts(export(module, example, "dynamo-eval")) == expected
