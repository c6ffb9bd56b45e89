"""The nine files of the onnx package, from another exporter, whose weights are outputs of ConstantOfShape nodes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest

from ghn_service.graph.onnx.reader import read_onnx

FOLDER = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
# Nodes per type: weights of convolution and linear layers, norms, pools, meetings; millions of parameters.
EXPECTED = {
    "bvlc_alexnet": ({"conv": 5, "sep_conv": 3, "bias": 8, "max_pool": 3}, 60.97),
    "densenet121": (
        {"conv": 121, "bias": 1, "bn": 121, "max_pool": 1, "avg_pool": 3, "concat": 58, "glob_avg": 1},
        8.06,
    ),
    "inception_v1": ({"conv": 58, "bias": 58, "max_pool": 13, "concat": 9, "glob_avg": 1}, 7.00),
    "inception_v2": (
        {"conv": 70, "bias": 1, "bn": 69, "max_pool": 5, "avg_pool": 7, "concat": 10, "glob_avg": 1},
        11.21,
    ),
    "resnet50": ({"conv": 54, "bias": 1, "bn": 53, "max_pool": 1, "sum": 16, "glob_avg": 1}, 25.56),
    "shufflenet": (
        {"conv": 2, "sep_conv": 48, "bias": 2, "bn": 49, "max_pool": 1, "avg_pool": 3, "concat": 3, "sum": 13,
         "glob_avg": 1},
        1.39,
    ),
    "squeezenet": ({"conv": 26, "bias": 26, "max_pool": 3, "concat": 8, "glob_avg": 1}, 1.24),
    "vgg19": ({"conv": 19, "bias": 19, "max_pool": 5}, 143.67),
    "zfnet512": ({"conv": 8, "bias": 8, "max_pool": 3}, 87.25),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_light_models(name: str) -> None:
    graph = read_onnx((FOLDER / f"light_{name}.onnx").read_bytes())
    types, millions = EXPECTED[name]
    assert Counter(node.op_type for node in graph.nodes) == {"input": 1, **types}
    assert graph.num_parameters / 1e6 == pytest.approx(millions, abs=0.01)
    assert sum(node.is_head for node in graph.nodes) == 2
    assert not graph.unknown_operators


def test_the_light_resnet50_is_the_torchvision_resnet50_up_to_its_strides() -> None:
    graph = read_onnx((FOLDER / "light_resnet50.onnx").read_bytes())
    assert (graph.num_nodes, len(graph.edges)) == (127, 142)
