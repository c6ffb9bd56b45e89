"""A filled ONNX file as a trainable torch module, for fine-tuning where there is no training script, and back.

onnx2torch, the known library for this, refuses BatchNormalization in train mode and is tested up to opset 16; files for
this service are exported in train mode, with opset 18 and above. Hence a converter of our own for classifiers: real
torch layers under the names of the weights, so that strategies find them and deltas fit the module that was exported;
shapes that the exporter froze for one image size, and a batch of any size. Tuned values go back into the file that the
module was made from, side networks beside its nodes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from graphlib import TopologicalSorter
from typing import Any

import numpy as np
import onnx
import onnx_ir
import torch
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes.common import InlinePass, RemoveUnusedNodesPass
from torch import fx, nn

from ghn_client.errors import InvalidOptionError, UnsupportedModuleError
from ghn_client.finetune.additive import AdditiveModule
from ghn_client.finetune.side_network import ClosedFormSideNetwork, SideNetwork
from ghn_client.onnx.edit import copied, graphs, tensor_proto, with_own_tensors
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
    tensors = {name: _tensor(value.const_value) for name, value in read.graph.initializers.items()}
    builder = Builder(tensors, parameters, _inputs(model)[0].name, example)
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
    kept = module.state_dict()
    module.meta[NAMES] = {path: name for path, name in builder.names.items() if path in kept}
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
        _read(readers[0], alone=True) if not alone and source.op_type == "MatMul" and len(readers) == 1 else None,
    )


def _computed(builder: Builder, source: onnx_ir.Node, node: OnnxNode, inputs: list[Any]) -> Any:
    """What a node without weights makes of its inputs: a constant of constants, else a call in the graph."""
    depends = any(value is not None and not isinstance(value, torch.Tensor) for value in inputs)
    constant = onnx_ir.convenience.get_const_tensor(source.outputs[0])
    if constant is not None:
        return _tensor(constant)
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


# ---- back to the file ------------------------------------------------------------------------------------------------


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
        result = merge_onnx(result, additive.side, reads=reads, adds_to=adds_to, prefix=f"side{index}")
    return result


def _with_values(module: nn.Module, names: Mapping[str, tuple[str, bool]], model: onnx.ModelProto) -> onnx.ModelProto:
    result = copied(with_own_tensors(model))
    tensors = {tensor.name: tensor for tensor in result.graph.initializer}
    state, written = module.state_dict(), dict[str, torch.Tensor]()
    for path, (name, transposed) in names.items():
        value = state[path].T if transposed else state[path]
        if name in written and not torch.equal(written[name], value):
            raise UnsupportedModuleError(
                f"layers that share {name!r} in the file have become different and fit no copy of it"
            )
        written[name] = value
        tensors[name].CopyFrom(tensor_proto(name, value, tensors[name].data_type))
    for path in state.keys() - names.keys():  # biases that merged norm layers brought to layers without one
        weight = names.get(f"{path.removesuffix('bias')}weight")
        if path.endswith(".bias") and weight is not None:
            _add_bias(result.graph, weight[0], state[path])
    _sort_nodes(result.graph)
    return result


def _add_bias(graph: onnx.GraphProto, weight: str, value: torch.Tensor) -> None:
    """Gives the operator that reads ``weight`` a bias (channels)."""
    reader = next(node for node in graph.node if weight in node.input)
    while reader.op_type == "Transpose":
        reader = next(node for node in graph.node if reader.output[0] in node.input)
    bias = tensor_proto(f"{weight}.inserted_bias", value)
    graph.initializer.append(bias)
    if reader.op_type in ("Conv", "ConvTranspose", "Gemm"):
        reader.input.append(bias.name)
        return
    result, product = reader.output[0], f"{reader.output[0]}.without_bias"
    reader.output[0] = product
    graph.node.append(onnx.helper.make_node("Add", [product, bias.name], [result], name=f"{bias.name}.add"))


def merge_onnx(
    base: onnx.ModelProto,
    side: nn.Module,
    *,
    reads: str | None = None,
    adds_to: str | None = None,
    prefix: str = "side",
) -> onnx.ModelProto:
    """A copy of ``base`` whose output has the side network added.

    Args:
        base: Filled model with one output of logits (B, C).
        side: The ``SideNetwork`` or ``ClosedFormSideNetwork``.
        reads: Tensor that g reads: default the first graph input; for ``at="features"`` the name of the head's input.
        adds_to: Tensor that g is added to; default the first graph output.
        prefix: Of all new names; choose another one for every stacked network.

    Raises:
        InvalidOptionError: A tensor name does not exist, or the prefix is taken.
        UnsupportedModuleError: The side network is of another class.
    """
    model = copied(base)
    graph = model.graph
    known = {value.name for value in (*graph.input, *graph.output)}
    known |= {output for node in graph.node for output in node.output}
    source, target = reads or graph.input[0].name, adds_to or graph.output[0].name
    for name in (source, target):
        if name not in known:
            raise InvalidOptionError(f"the graph has no tensor {name!r}; it ends in {[o.name for o in graph.output]}")
    if any(initializer.name.startswith(f"{prefix}.") for initializer in graph.initializer):
        raise InvalidOptionError(f"the graph already has initializers named {prefix}.*; choose another prefix")
    renamed = f"{prefix}.base_output"
    for node in graph.node:
        node.output[:] = [renamed if output == target else output for output in node.output]
    writer = _Writer(graph, prefix)
    if isinstance(side, SideNetwork):
        added = writer.node("Flatten", source, axis=1)
        for place, layer in enumerate(side.layers):
            weights = [(f"layers.{place}.{role}", layer.get_parameter(role)) for role in ("weight", "bias")]
            added = writer.node("Gemm", added, *weights, transB=1)
            if place + 1 < len(side.layers):
                added = writer.node("Relu", added)
    elif isinstance(side, ClosedFormSideNetwork):
        added = _closed_form_nodes(writer, writer.node("Flatten", source, axis=1), side)
    else:
        raise UnsupportedModuleError(f"expected a side network of this package, got {type(side).__name__}")
    graph.node.append(onnx.helper.make_node("Add", [renamed, added], [target], name=f"{prefix}.add"))
    _sort_nodes(graph)
    onnx.checker.check_model(model)
    return model


class _Writer:
    """Appends nodes with a common prefix; tensors among their inputs become initializers."""

    def __init__(self, graph: onnx.GraphProto, prefix: str) -> None:
        self.graph, self.prefix, self.count = graph, prefix, 0

    def node(self, op_type: str, *inputs: str | tuple[str, torch.Tensor], **attributes: Any) -> str:
        tensors = [tensor_proto(f"{self.prefix}.{x[0]}", x[1]) for x in inputs if isinstance(x, tuple)]
        self.graph.initializer.extend(tensors)
        names = [item if isinstance(item, str) else f"{self.prefix}.{item[0]}" for item in inputs]
        self.count += 1
        output = f"{self.prefix}.{op_type.lower()}_{self.count}"
        self.graph.node.append(onnx.helper.make_node(op_type, names, [output], name=output, **attributes))
        return output


def _closed_form_nodes(writer: _Writer, features: str, side: ClosedFormSideNetwork) -> str:
    double = side.center.dtype == torch.float64
    if double:
        features = writer.node("Cast", features, to=onnx.TensorProto.DOUBLE)
    centred = writer.node("Sub", features, ("center", side.center))
    lines = writer.node("MatMul", centred, ("directions", side.directions.T))
    chosen = writer.node("Gather", lines, ("select", side.select), axis=1)
    hidden = writer.node("Relu", writer.node("Sub", chosen, ("knots", side.knots)))
    if side.depth == 3:
        mixed = writer.node("MatMul", hidden, ("mixing_weight", side.mixing_weight.T))
        hidden = writer.node("Relu", writer.node("Add", mixed, ("mixing_bias", side.mixing_bias)))
    output = writer.node("MatMul", hidden, ("output_weight", side.output_weight.T))
    output = writer.node("Add", output, ("output_bias", side.output_bias))
    return writer.node("Cast", output, to=onnx.TensorProto.FLOAT) if double else output


def _sort_nodes(graph: onnx.GraphProto) -> None:
    """Orders nodes so that each comes after those it reads (a network that is added inside may come too late)."""
    nodes = [copied(node) for node in graph.node]
    producers = {output: index for index, node in enumerate(nodes) for output in node.output}
    parts = {index: graphs(onnx.GraphProto(node=[node])) for index, node in enumerate(nodes)}  # it, and what is inside
    reads = {index: {name for x in inner for part in x.node for name in part.input} for index, inner in parts.items()}
    needs = {index: {producers[name] for name in names if name in producers} for index, names in reads.items()}
    del graph.node[:]
    graph.node.extend(nodes[index] for index in TopologicalSorter(needs).static_order())
