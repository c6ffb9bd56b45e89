"""ONNX layers as torch modules: those with weights at the paths that the names of the weights give, dropout, pooling.

A weight ``features.0.weight`` makes ``features.0`` a ``Conv2d``, ``BatchNorm2d`` or ``Linear``, so that strategies find
what they look for; weights with other names stay parameters, which torch's functions read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ghn_client.errors import UnsupportedModuleError
from ghn_client.onnx.torch_builder import Builder, Traced, legal_path

# By the number of dimensions of the input, (B, C, ...).
CONVOLUTIONS: dict[int, Callable[..., nn.Module]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
CONVOLUTION_FUNCTIONS = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}
BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
INSTANCE_NORMS = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}
MAX_POOLS = {3: functional.max_pool1d, 4: functional.max_pool2d, 5: functional.max_pool3d}
MEAN_POOLS = {3: functional.avg_pool1d, 4: functional.avg_pool2d, 5: functional.avg_pool3d}


@dataclass(frozen=True, eq=False)
class OnnxNode:
    """A node of the file."""

    op_type: str
    name: str  # may be empty
    inputs: tuple[str, ...]  # names, empty where left out
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]  # numbers, text, lists or tensors
    follower: OnnxNode | None = None  # of a MatMul the only node that reads it, if there is just one

    def input(self, index: int) -> str:
        """Name of an input, empty where it is left out."""
        return self.inputs[index] if index < len(self.inputs) else ""


def _traced(b: Builder, node: OnnxNode) -> Traced:
    """The first input, which must depend on the network's input or on a parameter."""
    value = b.value(node.inputs[0])
    if not isinstance(value, Traced):
        raise UnsupportedModuleError(f"{node.op_type} {node.name!r} of a constant is not supported")
    return value


# ---- layers with weights ---------------------------------------------------------------------------------------------


def _bias(b: Builder, name: str) -> tuple[str, torch.Tensor | None]:
    """The bias of a layer: name of an initializer, or a constant that is not zero."""
    if not name or name in b.initializers:
        return name, None
    value = b.value(name)
    if isinstance(value, torch.Tensor):
        return "", value if bool(value.any()) else None
    raise UnsupportedModuleError(f"the bias {name!r} depends on the input")


def _place(
    b: Builder,
    node: OnnxNode,
    source: Traced,
    build: Callable[[], nn.Module],
    weights: Mapping[str, str],
    *,
    transposed: bool = False,
) -> Traced:
    """A layer with the named weights in it, called on ``source``; the same weights again are the same layer.

    It goes to ``X`` for weights ``X.weight`` and ``X.bias``, else to the name of the node.
    """
    present = {role: name for role, name in weights.items() if name}
    known = b.layers.get((node.op_type, *present.values()))
    if known is not None:
        return b.module(known, b.root.get_submodule(known), source)
    prefixes = {name.removesuffix(f".{role}") for role, name in present.items() if name.endswith(f".{role}")}
    path = legal_path(node.name or node.outputs[0]).replace(".", "_")
    if len(prefixes) == 1:
        path = legal_path(prefixes.pop())
    while b.has_path(path) and not b.holds_only(path, present):
        path += "_"
    layer = build()
    for role, name in present.items():
        is_matrix = transposed and role == "weight"
        tensor = b.initializers[name]
        getattr(layer, role).data = (tensor.T if is_matrix else tensor).clone().contiguous()
        if b.names.get(f"{path}.{role}") == (name, False):  # a node has read its shape before
            setattr(layer, role, b.root.get_parameter(f"{path}.{role}"))
        b.names[f"{path}.{role}"] = name, is_matrix
    b.layers[(node.op_type, *present.values())] = path
    return b.module(path, layer, source)


def _convolution(b: Builder, node: OnnxNode) -> Any:
    source, name = _traced(b, node), node.inputs[1]
    bias, constant = _bias(b, node.input(2))
    weight, rank = b.initializers.get(name), source.single.dim()
    source, padding = _padded(b, source, node)
    options: dict[str, Any] = {
        "stride": tuple(node.attributes.get("strides", [1] * (rank - 2))),
        "padding": padding,
        "dilation": tuple(node.attributes.get("dilations", [1] * (rank - 2))),
        "groups": node.attributes.get("group", 1),
    }
    if weight is None:
        operands = [source, b.value(name), b.value(node.inputs[2]) if node.input(2) else None]
        return b.call(CONVOLUTION_FUNCTIONS[rank], *operands, **options)
    outputs, fan_in, *kernel = weight.shape
    channels = fan_in * options["groups"]

    def build() -> nn.Module:
        return CONVOLUTIONS[rank](channels, outputs, tuple(kernel), bias=bool(bias), **options)

    result = _place(b, node, source, build, {"weight": name, "bias": bias})
    return result if constant is None else b.call(torch.add, result, constant.reshape(-1, *[1] * (rank - 2)))


def _batch_norm(b: Builder, node: OnnxNode) -> Any:
    """Statistics are those of the batch in train mode, whatever mode the file was exported in."""
    source = _traced(b, node)
    names = dict(zip(("weight", "bias", "running_mean", "running_var"), node.inputs[1:5], strict=True))
    if not all(names[role] in b.initializers for role in ("running_mean", "running_var")):
        raise UnsupportedModuleError(f"the running statistics of {node.name!r} are no tensors of the file")
    affine = names["weight"] in b.initializers and names["bias"] in b.initializers
    if not affine:
        scale, shift = b.value(names.pop("weight")), b.value(names.pop("bias"))
        plain = isinstance(scale, torch.Tensor) and bool((scale == 1).all())
        if not plain or not isinstance(shift, torch.Tensor) or bool(shift.any()):
            raise UnsupportedModuleError(f"scale and shift of {node.name!r} are no tensors of the file")
    channels, epsilon = len(b.initializers[names["running_mean"]]), node.attributes.get("epsilon", 1e-5)
    momentum = 1.0 - node.attributes.get("momentum", 0.9)
    layer = BATCH_NORMS[source.single.dim()]
    return _place(b, node, source, lambda: layer(channels, eps=epsilon, momentum=momentum, affine=affine), names)


def _norm(
    b: Builder, node: OnnxNode, layer: Callable[..., nn.Module], function: Callable[..., Any], **options: Any
) -> Any:
    """A norm as ``layer(**options)``, or as ``function`` where its weights are no tensors of the file."""
    source, weight, bias = _traced(b, node), node.inputs[1], node.input(2)
    options["eps"] = node.attributes.get("epsilon", 1e-5)
    if layer is nn.LayerNorm and not _bias(b, bias)[0] and _bias(b, bias)[1] is None:
        bias, options["bias"] = "", False
    if all(name in b.initializers for name in (weight, bias) if name):
        return _place(b, node, source, lambda: layer(**options), {"weight": weight, "bias": bias})
    for unknown_to_functions in ("bias", "affine", "num_channels", "num_features"):
        options.pop(unknown_to_functions, None)
    for role, name in {"weight": weight, "bias": bias}.items():
        if name:
            options[role] = b.value(name)
    return b.call(function, source, **options)


def _layer_norm(b: Builder, node: OnnxNode) -> Any:
    shape = tuple(_traced(b, node).single.shape[node.attributes.get("axis", -1) :])
    if node.op_type == "RMSNormalization":
        return _norm(b, node, nn.RMSNorm, functional.rms_norm, normalized_shape=shape)
    return _norm(b, node, nn.LayerNorm, functional.layer_norm, normalized_shape=shape)


def _group_norm(b: Builder, node: OnnxNode) -> Any:
    shape = _traced(b, node).single.shape
    if node.op_type == "InstanceNormalization":
        return _norm(b, node, INSTANCE_NORMS[len(shape)], functional.instance_norm, num_features=shape[1], affine=True)
    groups = node.attributes["num_groups"]
    return _norm(b, node, nn.GroupNorm, functional.group_norm, num_groups=groups, num_channels=shape[1])


def _gemm(b: Builder, node: OnnxNode) -> Any:
    source, name, attributes = _traced(b, node), node.inputs[1], node.attributes
    plain = not attributes.get("transA") and attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0
    bias, constant = _bias(b, node.input(2))
    if plain and name in b.initializers and name not in b.values and constant is None:
        result = _linear(b, node, source, name, bias, transposed=not attributes.get("transB"))
        b.tensors[str(result.node.target)] = node.inputs[0], node.outputs[0]
        return result
    weight = b.value(name)
    first = b.call(torch.t, source) if attributes.get("transA") else source
    result = b.call(torch.matmul, first, b.call(torch.t, weight) if attributes.get("transB") else weight)
    result = b.call(torch.mul, result, attributes.get("alpha", 1.0))
    if not node.input(2):
        return result
    return b.call(torch.add, result, b.call(torch.mul, b.value(node.inputs[2]), attributes.get("beta", 1.0)))


def _matrix_product(b: Builder, node: OnnxNode) -> Any:
    """MatMul; with a matrix of the file, and a bias that is added next, a linear layer."""
    first, name = b.value(node.inputs[0]), node.inputs[1]
    known = b.values.get(name)
    turned = known.transposed if isinstance(known, Traced) else ""
    weight = turned or name
    is_layer = isinstance(first, Traced) and weight in b.initializers and b.initializers[weight].dim() == 2
    if not is_layer or (known is not None and not turned):
        return b.call(torch.matmul, first, b.value(name))
    bias = ""  # the vector that the only reader of the product adds to it
    if node.follower is not None and node.follower.op_type == "Add":
        others = [other for other in node.follower.inputs if other != node.outputs[0]]
        outputs = b.initializers[weight].shape[0 if turned else 1]
        if len(others) == 1 and others[0] in b.initializers and b.initializers[others[0]].shape == (outputs,):
            bias = others[0]
    path = weight.removesuffix(".weight")
    if turned:
        is_shared = b.has_path(path) and not b.holds_only(path, {"weight": weight, "bias": bias})
        is_named_like_layer = "." not in weight.strip(".") or (path != weight and bias in ("", f"{path}.bias"))
        if is_shared or not is_named_like_layer:
            return b.call(functional.linear, first, b.parameter(weight))
    result = _linear(b, node, first, weight, bias, transposed=not turned)
    output = node.outputs[0]
    if bias and node.follower is not None:
        output = node.follower.outputs[0]
        b.absorbed[output] = result
    b.tensors[str(result.node.target)] = node.inputs[0], output
    return result


def _linear(b: Builder, node: OnnxNode, source: Traced, name: str, bias: str, *, transposed: bool) -> Traced:
    outputs, inputs = b.initializers[name].shape[:: -1 if transposed else 1]
    weights = {"weight": name, "bias": bias}
    return _place(b, node, source, lambda: nn.Linear(inputs, outputs, bias=bool(bias)), weights, transposed=transposed)


# ---- dropout, in the ways that exporters write it --------------------------------------------------------------------


class Bernoulli(nn.Module):
    """Ones with a probability, zeros else: dropout and stochastic depth as exporters write them; the mean in eval mode.

    For one sample ``shape`` is drawn, or what the input has.
    """

    def __init__(self, probability: float, shape: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.probability, self.shape = probability, shape

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """A tensor like ``inputs``, or (B, *shape) of its type."""
        shape = inputs.shape if self.shape is None else (len(inputs), *self.shape)
        means = inputs.new_full(shape, self.probability)
        return torch.bernoulli(means) if self.training else means


def _dropout(b: Builder, node: OnnxNode) -> Any:
    ratio: Any = b.value(node.inputs[1]) if node.input(1) else node.attributes.get("ratio", 0.5)
    if isinstance(ratio, Traced):
        raise UnsupportedModuleError(f"the ratio of {node.name!r} depends on the input")
    return b.module(b.free_path("dropouts.d"), nn.Dropout(float(ratio)), _traced(b, node))


def _random_uniform(b: Builder, node: OnnxNode) -> Any:
    """From 0 to 1; only what compares it with a number makes sense of it."""
    if (node.attributes.get("low", 0.0), node.attributes.get("high", 1.0)) != (0.0, 1.0):
        raise UnsupportedModuleError(f"{node.name!r} draws from another range than 0 to 1")
    like = b.value(node.inputs[0])
    b.random[node.outputs[0]] = like
    return like


def _random_comparison(b: Builder, node: OnnxNode) -> Any:
    """Less of a random tensor and a number, as dropout is written; ``None`` where it is another comparison."""
    if node.inputs[0] not in b.random:
        return None
    like, bound = b.random[node.inputs[0]], b.value(node.inputs[1])
    if not isinstance(bound, torch.Tensor) or bound.numel() != 1:
        raise UnsupportedModuleError(f"{node.name!r} compares random numbers with values of the input")
    path = b.free_path("dropouts.d")
    if isinstance(like, Traced):
        return b.module(path, Bernoulli(float(bound)), like)
    return b.module(path, Bernoulli(float(bound), tuple(like.shape[1:])), b.entry)


# ---- pooling ---------------------------------------------------------------------------------------------------------


def _padded(b: Builder, source: Traced, node: OnnxNode) -> tuple[Traced, tuple[int, ...]]:
    """Symmetric padding as numbers; where it is not symmetric the input is padded by a node of its own."""
    sizes = source.single.shape[2:]
    before, after = [0] * len(sizes), [0] * len(sizes)
    mode = node.attributes.get("auto_pad") or "NOTSET"
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        ones = [1] * len(sizes)
        strides, dilations = node.attributes.get("strides", ones), node.attributes.get("dilations", ones)
        windows = zip(sizes, node.attributes["kernel_shape"], strides, dilations, strict=True)
        for axis, (size, kernel, stride, dilation) in enumerate(windows):
            total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
            before[axis] = total // 2 if mode == "SAME_UPPER" else total - total // 2
            after[axis] = total - before[axis]
    elif "pads" in node.attributes:
        before, after = node.attributes["pads"][: len(sizes)], node.attributes["pads"][len(sizes) :]
    if before == after:
        return source, tuple(before)
    flat = [size for axis in reversed(range(len(sizes))) for size in (before[axis], after[axis])]
    value = float("-inf") if node.op_type == "MaxPool" else 0.0
    return b.call(functional.pad, source, tuple(flat), value=value), (0,) * len(sizes)


def _pool(b: Builder, node: OnnxNode) -> Any:
    plain, attributes = _traced(b, node), node.attributes
    source, padding = _padded(b, plain, node)
    rank = plain.single.dim()
    ones = [1] * (rank - 2)
    window = (tuple(attributes["kernel_shape"]), tuple(attributes.get("strides", ones)), padding)
    ceil = bool(attributes.get("ceil_mode", 0))
    if node.op_type == "MaxPool":
        return b.call(MAX_POOLS[rank], source, *window, tuple(attributes.get("dilations", ones)), ceil_mode=ceil)
    counted = bool(attributes.get("count_include_pad", 0))
    if source is not plain and not counted:
        raise UnsupportedModuleError(f"{node.name!r} averages over uneven padding without counting it")
    return b.call(MEAN_POOLS[rank], source, *window, ceil, counted)


def _global_pool(b: Builder, node: OnnxNode) -> Any:
    source = _traced(b, node)
    function = torch.mean if node.op_type == "GlobalAveragePool" else torch.amax
    return b.call(function, source, dim=tuple(range(2, source.single.dim())), keepdim=True)


def _local_response_norm(b: Builder, node: OnnxNode) -> Any:
    options = [node.attributes.get(name, default) for name, default in (("alpha", 1e-4), ("beta", 0.75), ("bias", 1.0))]
    return b.call(functional.local_response_norm, _traced(b, node), node.attributes["size"], *options)


#: What makes modules of nodes; ``None`` of one that leaves a node to ``OPERATORS``.
LAYERS: dict[str, Callable[[Builder, OnnxNode], Any]] = {
    "Conv": _convolution,
    "BatchNormalization": _batch_norm,
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _layer_norm,
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _group_norm,
    "Gemm": _gemm,
    "MatMul": _matrix_product,
    "Dropout": _dropout,
    "RandomUniformLike": _random_uniform,
    "Less": _random_comparison,
    "MaxPool": _pool,
    "AveragePool": _pool,
    "GlobalAveragePool": _global_pool,
    "GlobalMaxPool": _global_pool,
    "LRN": _local_response_norm,
}
