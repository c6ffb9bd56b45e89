"""A filled ONNX file as a trainable torch module, for fine-tuning where there is no training script.

onnx2torch, the known library for this, refuses BatchNormalization in train mode and is tested up to opset 16; files for
this service are exported in train mode, with opset 18 and above. Hence a converter of our own for classifiers: real
torch layers under the names of the weights, so that strategies find them and deltas fit the module that was exported;
shapes that the exporter froze for one image size, and a batch of any size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx.inliner import inline_local_functions
from torch import fx

from ghn_client.errors import UnsupportedModuleError
from ghn_client.onnx.edit import with_own_tensors
from ghn_client.onnx.torch_builder import Builder, Traced, batch_position
from ghn_client.onnx.torch_layers import LAYERS, OnnxNode
from ghn_client.onnx.torch_operators import OPERATORS

#: Key in ``meta`` of the module: path of a parameter or buffer -> initializer, and whether it is transposed.
NAMES = "ghn.onnx_names"
#: Key in ``meta`` of the module: path of a linear layer -> names of its input and its output in the file.
TENSORS = "ghn.onnx_tensors"
_DOMAINS = ("", "ai.onnx")


def input_shape(model: onnx.ModelProto) -> tuple[int, ...]:
    """The shape of the only input, 0 for free sizes.

    Raises:
        UnsupportedModuleError: The network has several inputs, or weights without values.
    """
    inputs = _inputs(model)
    if len(inputs) != 1:
        names = [info.name for info in inputs]
        raise UnsupportedModuleError(
            f"expected a model with weights and one input, got the inputs {names[:5]}{'...' if names[5:] else ''};"
            " a file without weights has to be filled first"
        )
    return tuple(dim.dim_value for dim in inputs[0].type.tensor_type.shape.dim)


def module_from_onnx(
    model: onnx.ModelProto, example: torch.Tensor, *, parameters: Collection[str] | None = None
) -> fx.GraphModule:
    """A torch module that computes the first output of ``model``, in eval mode.

    BatchNorm and dropout follow ``train()`` and ``eval()``, whatever mode the file was exported in. Sizes other than
    the batch are those of ``example``.

    Args:
        model: With values for all weights.
        example: An input (B, ...), with B = 1 or the batch size that the file fixes; its values should not be all
            the same.
        parameters: Names of the tensors that are trainable; default all float vectors and matrices, also tables
            that are none.

    Returns:
        The module: convolutions, linear and norm layers at the paths that their weights are named after.

    Raises:
        UnsupportedModuleError: An operator is unknown, a shape depends on values, samples depend on each other, or
            weights are missing.
    """
    input_shape(model)
    graph = with_own_tensors(inline_local_functions(model)).graph
    builder = Builder({tensor.name: _tensor(tensor) for tensor in graph.initializer}, parameters)
    builder.input(_inputs(model)[0].name, example)
    with torch.no_grad():
        for node in _needed(graph):
            _build(builder, node)
        output = builder.value(graph.output[0].name)
    if not isinstance(output, Traced) or output.single.dim() < 1 or batch_position(output) != 1:
        raise UnsupportedModuleError("the first output of the model does not depend on its input sample by sample")
    builder.graph.output(output.node)
    whole = fx.GraphModule(builder.root, builder.graph)
    whole.graph.eliminate_dead_code()
    module = fx.GraphModule(whole, whole.graph, class_name="OnnxModule")  # takes over what is used, in its order
    module.meta[NAMES] = {path: name for path, name in builder.names.items() if path in module.state_dict()}
    module.meta[TENSORS] = dict(builder.tensors)
    return module.eval()


def _inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    filled = {tensor.name for tensor in model.graph.initializer}
    return [info for info in model.graph.input if info.name not in filled]


def _needed(graph: onnx.GraphProto) -> list[OnnxNode]:
    """The nodes that the first output needs, in order, each with the only reader of its first output."""
    wanted, needed = {graph.output[0].name}, []
    for node in reversed(graph.node):
        if wanted & set(node.output):
            wanted.update(node.input)
            needed.append(node)
    reads = Counter(name for node in needed for name in node.input)
    readers = {name: node for node in needed for name in node.input}
    views: dict[int, OnnxNode] = {}
    for node in needed:  # from the end, so that readers are there before what they read
        alone = readers.get(node.output[0]) if reads[node.output[0]] == 1 else None
        views[id(node)] = OnnxNode(
            node.op_type if node.domain in _DOMAINS else f"{node.domain}::{node.op_type}",
            node.name,
            tuple(node.input),
            tuple(node.output),
            {attribute.name: _attribute(attribute) for attribute in node.attribute if attribute.name != "stash_type"},
            views.get(id(alone)),
        )
    return [views[id(node)] for node in reversed(needed)]


def _build(builder: Builder, node: OnnxNode) -> None:
    if node.outputs[0] in builder.absorbed:
        builder.values[node.outputs[0]] = builder.absorbed[node.outputs[0]]
        return
    try:
        outputs = _run(builder, node)
    except (RuntimeError, IndexError) as error:
        raise UnsupportedModuleError(
            f"{node.op_type} {node.name!r} fails with a batch of another size than that of the file ({error});"
            " export the network with a batch size of 1 or with a dynamic batch axis"
        ) from error
    several: Sequence[Any] = outputs if isinstance(outputs, tuple) else (outputs,)
    builder.values.update(zip(node.outputs, several, strict=False))


def _run(builder: Builder, node: OnnxNode) -> Any:
    outputs: Any = LAYERS[node.op_type](builder, node) if node.op_type in LAYERS else None
    if outputs is not None:
        return outputs
    if node.op_type not in OPERATORS:
        known = sorted({*LAYERS, *OPERATORS})
        raise UnsupportedModuleError(
            f"the operator {node.op_type!r} of node {node.name!r} cannot be trained here; known are {known}. Give"
            " SCRIPT:FACTORY, a function that returns the torch module, instead of the file"
        )
    inputs = [builder.value(name) if name else None for name in node.inputs]
    return OPERATORS[node.op_type](builder, inputs, node.attributes)


def _attribute(attribute: onnx.AttributeProto) -> Any:
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, onnx.TensorProto):
        return _tensor(value)
    if isinstance(value, bytes):
        return value.decode()
    return list(value) if attribute.type in (onnx.AttributeProto.INTS, onnx.AttributeProto.FLOATS) else value


def _tensor(proto: onnx.TensorProto) -> torch.Tensor:
    array = onnx.numpy_helper.to_array(proto)
    if array.dtype not in (np.float64, np.float32, np.float16, np.int64, np.int32, np.int8, np.uint8, np.bool_):
        array = array.astype(np.float32)
    return torch.from_numpy(array.copy())
