"""A filled ONNX file as a trainable torch module, for fine-tuning where there is no training script.

onnx2torch, the known library for this, refuses BatchNormalization in train mode and is tested up to opset 16; files for
this service are exported in train mode, with opset 18 and above. Hence a converter of our own for classifiers: real
torch layers under the names of the weights, so that strategies find them and deltas fit the module that was exported;
shapes that the exporter froze for one image size, and a batch of any size.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import onnx
import onnx_ir
import torch
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes.common import InlinePass, RemoveUnusedNodesPass
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
_RANDOM = ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")


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
    read = onnx_ir.from_proto(with_own_tensors(model))
    InlinePass()(read)
    del read.graph.outputs[1:]
    RemoveUnusedNodesPass()(read)
    initializers = read.graph.initializers.values()
    builder = Builder({str(value.name): _tensor(value.const_value) for value in initializers}, parameters)
    builder.input(_inputs(model)[0].name, example)
    with torch.no_grad():
        for node in read.graph:
            _build(builder, node)
        output = builder.value(str(read.graph.outputs[0].name))
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


def _build(builder: Builder, source: onnx_ir.Node) -> None:
    """Gives the outputs of a node their values."""
    node = _read(source)
    if node.outputs[0] in builder.absorbed:
        builder.values[node.outputs[0]] = builder.absorbed[node.outputs[0]]
        return
    try:
        outputs = LAYERS[node.op_type](builder, node) if node.op_type in LAYERS else None
        if outputs is None:
            inputs = [builder.value(name) if name else None for name in node.inputs]
            outputs = _computed(builder, source, node, inputs)
    except (RuntimeError, IndexError) as error:
        raise UnsupportedModuleError(
            f"{node.op_type} {node.name!r} fails with a batch of another size than that of the file ({error});"
            " export the network with a batch size of 1 or with a dynamic batch axis"
        ) from error
    builder.values.update(zip(node.outputs, outputs if isinstance(outputs, tuple) else (outputs,), strict=False))


def _read(source: onnx_ir.Node, *, alone: bool = False) -> OnnxNode:
    readers = source.outputs[0].consumers()
    attributes = {
        name: _tensor(item.as_tensor()) if item.type == onnx_ir.AttributeType.TENSOR else item.value
        for name, item in source.attributes.items()
    }
    return OnnxNode(
        f"{source.domain}::{source.op_type}" if source.domain else source.op_type,
        source.name or "",
        tuple(value.name or "" if value is not None else "" for value in source.inputs),
        tuple(value.name or "" for value in source.outputs),
        attributes,
        None if alone or len(source.outputs[0].uses()) != 1 else _read(readers[0], alone=True),
    )


def _computed(builder: Builder, source: onnx_ir.Node, node: OnnxNode, inputs: list[Any]) -> Any:
    """What a node without weights makes of its inputs: a constant of constants, else a call in the graph."""
    depends = any(value is not None and not isinstance(value, torch.Tensor) for value in inputs)
    if not depends and not source.domain and source.op_type not in _RANDOM:
        assert source.graph is not None
        feeds = {name: value.numpy() for name, value in zip(node.inputs, inputs, strict=True) if value is not None}
        opset = onnx.helper.make_opsetid("", source.graph.opset_imports.get("", 1))
        proto = onnx_ir.to_proto(source)
        function = onnx.helper.make_function("ghn", "constant", list(feeds), list(node.outputs), [proto], [opset])
        results = ReferenceEvaluator(function).run(None, feeds, {})
        return tuple([_tensor(item) for item in one] if isinstance(one, list) else _tensor(one) for one in results)
    if node.op_type not in OPERATORS:
        raise UnsupportedModuleError(
            f"the operator {node.op_type!r} of node {node.name!r} cannot be trained here; known are"
            f" {sorted({*LAYERS, *OPERATORS})}. Give SCRIPT:FACTORY, a function that returns the torch module, instead"
            " of the file"
        )
    return OPERATORS[node.op_type](builder, inputs, node.attributes)


def _tensor(value: Any) -> torch.Tensor:
    """A tensor of the file or an array, in float32 where torch lacks the type."""
    array = np.array(value.numpy() if hasattr(value, "numpy") else value)
    if array.dtype not in (np.float64, np.float32, np.float16, np.int64, np.int32, np.int8, np.uint8, np.bool_):
        array = array.astype(np.float32)
    return torch.from_numpy(array)
