"""A few lines to write small ONNX models by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
from onnx import TensorProto, helper

from ghn_service.graph.architecture import ArchitectureGraph
from ghn_service.graph.onnx.reader import read_onnx


class Model:
    """An ONNX model under construction; weights have shapes but no data."""

    def __init__(
        self, inputs: dict[str, tuple[int, ...]] | None = None, *, producer: str = "", opset: int = 20
    ) -> None:
        self.inputs = inputs or {"x": (1, 3, 8, 8)}
        self.producer = producer
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.functions: list[onnx.FunctionProto] = []
        self.metadata: dict[str, str] = {}

    def weight(self, name: str, *shape: int, data_type: int = TensorProto.FLOAT) -> str:
        """Adds an initializer without data."""
        self.initializers.append(onnx.TensorProto(name=name, dims=shape, data_type=data_type))
        return name

    def integers(self, name: str, *values: int) -> str:
        """Adds an integer initializer with its data."""
        self.initializers.append(helper.make_tensor(name, TensorProto.INT64, [len(values)], values))
        return name

    def node(self, op_type: str, inputs: Sequence[str], output: str | Sequence[str], **attributes: Any) -> str:
        """Adds a node and returns the name of its first output."""
        outputs = [output] if isinstance(output, str) else list(output)
        self.nodes.append(helper.make_node(op_type, list(inputs), outputs, **attributes))
        return outputs[0]

    def conv(
        self, value: str, name: str, out: int, channels: int, *, size: int = 3, bias: bool = False, **more: Any
    ) -> str:
        """Adds a convolution whose weight is ``<name>.weight``."""
        inputs = [value, self.weight(f"{name}.weight", out, channels, size, size)]
        if bias:
            inputs.append(self.weight(f"{name}.bias", out))
        more.setdefault("pads", [size // 2] * 4)
        return self.node("Conv", inputs, f"{name}_out", **more)

    def linear(self, value: str, name: str, out: int, features: int) -> str:
        """Adds a Gemm with torch's layout, ``<name>.weight`` and ``<name>.bias``."""
        weight, bias = self.weight(f"{name}.weight", out, features), self.weight(f"{name}.bias", out)
        return self.node("Gemm", [value, weight, bias], f"{name}_out", transB=1)

    def proto(self, *outputs: str) -> onnx.ModelProto:
        """The model with these outputs; the last node's first output if none are named."""
        names = outputs or (self.nodes[-1].output[0],)
        infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in self.inputs.items()]
        results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
        graph = helper.make_graph(self.nodes, "network", infos, results, self.initializers)
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", self.opset), helper.make_opsetid("custom", 1)],
            producer_name=self.producer,
            functions=self.functions,
            ir_version=10,
        )
        helper.set_model_props(model, self.metadata)
        return model

    def read(self, *outputs: str) -> ArchitectureGraph:
        """The architecture of the model."""
        return read_onnx(self.proto(*outputs).SerializeToString())


def op_types(graph: ArchitectureGraph) -> list[str]:
    """Op types of the nodes, in order, without the input."""
    return [node.op_type for node in graph.nodes[1:]]


def edges_by_name(graph: ArchitectureGraph) -> set[tuple[str, str]]:
    """Edges as pairs of node names; parameters under their own names."""
    names = [node.weight.name if node.weight else node.op_type for node in graph.nodes]
    return {(names[source], names[target]) for source, target in graph.edges}


def fallbacks(graph: ArchitectureGraph) -> dict[str, str]:
    """Fallback rule per parameter that no node stands for."""
    return {spec.name: spec.fallback for spec in graph.other_parameters}
