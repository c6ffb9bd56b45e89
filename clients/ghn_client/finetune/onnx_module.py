"""A filled ONNX file as a trainable torch module, for fine-tuning where there is no training script.

onnx2torch, the known library for this, refuses BatchNormalization in train mode and is tested up to opset 16; files for
this service are exported in train mode, with opset 18 and above. Hence a converter of our own for classifiers: real
torch layers under the names of the weights, so that strategies find them and deltas fit the module that was exported;
shapes that the exporter froze for one image size, and a batch of any size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx.external_data_helper import load_external_data_for_model
from torch import fx, nn

from ghn_client.errors import InvalidArchitectureError, UnsupportedModuleError
from ghn_client.finetune.additive import AdditiveModule
from ghn_client.finetune.merge_onnx import merge_onnx
from ghn_client.finetune.onnx_builder import Builder, Traced, batch_position
from ghn_client.finetune.onnx_layers import LAYERS
from ghn_client.finetune.onnx_node import OnnxNode
from ghn_client.finetune.onnx_operators import OPERATORS
from ghn_client.structure import parse_onnx

#: Key in ``meta`` of the module: path of a parameter or buffer -> initializer, and whether it is transposed.
NAMES = "ghn.onnx_names"
#: Key in ``meta`` of the module: path of a linear layer -> names of its input and its output in the file.
TENSORS = "ghn.onnx_tensors"
_DOMAINS = ("", "ai.onnx")


def read_model(path: str | Path) -> onnx.ModelProto:
    """An ONNX file with the data that lies beside it.

    Raises:
        InvalidArchitectureError: It cannot be read, or is no ONNX model.
    """
    try:
        model = parse_onnx(Path(path).read_bytes())
        load_external_data_for_model(model, str(Path(path).parent))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise InvalidArchitectureError(f"cannot read the model {str(path)!r}: {error}") from error
    return model


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
    graph = _unmerged(_inlined(model)).graph
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


def to_onnx(tuned: nn.Module, converted: fx.GraphModule, model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of ``model`` with tuned values, and with the side networks of additive fine-tuning as nodes.

    Args:
        tuned: ``handle.merge()`` of a handle on ``converted``.
        converted: From :func:`module_from_onnx`.
        model: The file that it was made from.

    Raises:
        UnsupportedModuleError: A side network reads the features of a head that is no linear layer of the file, or
            layers that share a tensor in the file have become different.
    """
    sides: list[AdditiveModule] = []
    while isinstance(tuned, AdditiveModule):
        sides.append(tuned)
        tuned = tuned.base
    result = _with_values(tuned, converted.meta[NAMES], model)
    for index, additive in enumerate(reversed(sides)):
        reads = adds_to = None
        if additive.head is not None:
            head = additive.head.rpartition("base.")[2]
            if head not in converted.meta[TENSORS]:
                raise UnsupportedModuleError(f"the head {head!r} is no linear layer of the file; use at='logits'")
            reads, adds_to = converted.meta[TENSORS][head]
        result = merge_onnx(result, additive.side, reads=reads, adds_to=adds_to, prefix=f"side{index}")  # type: ignore[arg-type]
    return result


def _with_values(module: nn.Module, names: Mapping[str, tuple[str, bool]], model: onnx.ModelProto) -> onnx.ModelProto:
    result = onnx.ModelProto()
    result.CopyFrom(_unmerged(model))
    tensors = {tensor.name: tensor for tensor in result.graph.initializer}
    state, written = module.state_dict(), dict[str, np.ndarray]()
    for path, (name, transposed) in names.items():
        value = state[path].detach().cpu()
        array = (value.T if transposed else value).contiguous().numpy()
        if name in written and not np.array_equal(written[name], array):
            raise UnsupportedModuleError(
                f"layers that share {name!r} in the file have become different and fit no copy of it"
            )
        written[name] = array
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensors[name].data_type)
        tensors[name].CopyFrom(onnx.numpy_helper.from_array(array.astype(dtype), name))
    return result


def _inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    filled = {tensor.name for tensor in model.graph.initializer}
    return [info for info in model.graph.input if info.name not in filled]


def _unmerged(model: onnx.ModelProto) -> onnx.ModelProto:
    """Gives every layer a tensor of its own where an exporter had merged equal ones behind Identity nodes."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    merged = [node for node in model.graph.node if node.op_type == "Identity" and node.input[0] in tensors]
    if not merged:
        return model
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for node in merged:
        own = result.graph.initializer.add()
        own.CopyFrom(tensors[node.input[0]])
        own.name = node.output[0]
        result.graph.node.remove(node)
    return result


def _inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    if not model.functions:
        return model
    from onnx import inliner

    return inliner.inline_local_functions(model)


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
