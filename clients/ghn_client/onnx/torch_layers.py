"""ONNX operators with weights, as torch's own layers at the paths that the names of the weights give.

A weight ``features.0.weight`` makes ``features.0`` a ``Conv2d``, ``BatchNorm2d`` or ``Linear``, so that strategies find
what they look for; weights with other names stay parameters, which torch's functions read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ghn_client.errors import UnsupportedModuleError
from ghn_client.onnx.torch_builder import Builder, Traced, Value, legal_path
from ghn_client.onnx.torch_operators import rank_of


@dataclass(frozen=True, eq=False)
class OnnxNode:
    """A node of the file.

    Attributes:
        op_type: Operator.
        name: Of the node, may be empty.
        inputs: Names of its inputs; empty where left out.
        outputs: Names of its outputs.
        attributes: By name: numbers, text, lists or tensors.
        follower: The only node that reads the first output, if there is just one.
    """

    op_type: str
    name: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    attributes: dict[str, Any] = field(default_factory=dict)
    follower: OnnxNode | None = None

    def input(self, index: int) -> str:
        """Name of an input, empty where it is left out."""
        return self.inputs[index] if index < len(self.inputs) else ""


def traced(b: Builder, node: OnnxNode, index: int = 0) -> Traced:
    """An input that depends on the network's input or on a parameter."""
    value = b.value(node.inputs[index])
    if not isinstance(value, Traced):
        raise UnsupportedModuleError(f"{node.op_type} {node.name!r} of a constant is not supported")
    return value


def padded(b: Builder, source: Traced, node: OnnxNode, spatial: int) -> tuple[Traced, tuple[int, ...]]:
    """Symmetric padding as numbers; where it is not symmetric the input is padded by a node of its own."""
    pads = list(node.attributes.get("pads", [0] * 2 * spatial))
    automatic = node.attributes.get("auto_pad") or "NOTSET"
    if automatic in ("SAME_UPPER", "SAME_LOWER"):
        pads = _same_padding(source, node, spatial, automatic)
    before, after = pads[:spatial], pads[spatial:]
    if before == after:
        return source, tuple(before)
    flat = [size for axis in reversed(range(spatial)) for size in (before[axis], after[axis])]
    value = float("-inf") if node.op_type == "MaxPool" else 0.0
    return b.call(functional.pad, source, tuple(flat), value=value), (0,) * spatial


def _same_padding(source: Traced, node: OnnxNode, spatial: int, mode: str) -> list[int]:
    strides = node.attributes.get("strides", [1] * spatial)
    dilations = node.attributes.get("dilations", [1] * spatial)
    before, after = [], []
    for size, kernel, stride, dilation in zip(
        source.single.shape[2:], node.attributes["kernel_shape"], strides, dilations, strict=True
    ):
        total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
        first = total // 2 if mode == "SAME_UPPER" else total - total // 2
        before.append(first)
        after.append(total - first)
    return before + after


CONVOLUTIONS: dict[int, Callable[..., nn.Module]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
BATCH_NORMS: dict[int, Callable[..., nn.Module]] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}
INSTANCE_NORMS: dict[int, Callable[..., nn.Module]] = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}


def _path(node: OnnxNode, **weights: str) -> str:
    """Where a layer goes: ``X`` for weights ``X.weight`` and ``X.bias``, else the name of the node."""
    prefixes = {name.removesuffix(f".{role}") for role, name in weights.items() if name.endswith(f".{role}")}
    if len(prefixes) == 1:
        return legal_path(prefixes.pop())
    return legal_path(node.name or node.outputs[0]).replace(".", "_")


def _named_like_layer(weight: str, bias: str) -> bool:
    """Whether names are ``X.weight`` and ``X.bias``, or no names of torch at all."""
    if "." not in weight.strip("."):
        return True
    prefix = weight.removesuffix(".weight")
    return prefix != weight and bias in ("", f"{prefix}.bias")


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
    build: Callable[[], nn.Module],
    source: Traced,
    weights: Mapping[str, str],
    *,
    transposed: bool = False,
) -> Traced:
    """A layer with the named weights in it, called on ``source``; the same weights again are the same layer."""
    present = {role: name for role, name in weights.items() if name}
    known = b.layers.get((node.op_type, *present.values()))
    if known is not None:
        return b.module(known, b.root.get_submodule(known), source)
    path = _path(node, **present)
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
    b.put(path, layer)
    return b.module(path, layer, source)


# ---- layers ---------------------------------------------------------------------------------------------------------


def convolution(b: Builder, node: OnnxNode) -> Value:
    """Conv."""
    source, name = traced(b, node), node.inputs[1]
    bias, constant = _bias(b, node.input(2))
    weight = b.initializers.get(name)
    spatial = rank_of(source) - 2
    source, padding = padded(b, source, node, spatial)
    options: dict[str, Any] = {
        "stride": tuple(node.attributes.get("strides", [1] * spatial)),
        "padding": padding,
        "dilation": tuple(node.attributes.get("dilations", [1] * spatial)),
        "groups": node.attributes.get("group", 1),
    }
    if weight is None:
        function = (functional.conv1d, functional.conv2d, functional.conv3d)[spatial - 1]
        operands = [source, b.value(name), b.value(node.inputs[2]) if node.input(2) else None]
        return b.call(function, *operands, **options)  # type: ignore[no-any-return]

    def build() -> nn.Module:
        outputs, fan_in, *kernel = weight.shape
        channels = fan_in * options["groups"]
        return CONVOLUTIONS[spatial + 2](channels, outputs, tuple(kernel), bias=bool(bias), **options)

    result = _place(b, node, build, source, {"weight": name, "bias": bias})
    if constant is not None:
        return b.call(torch.add, result, constant.reshape(-1, *[1] * spatial))  # type: ignore[no-any-return]
    return result


def batch_norm(b: Builder, node: OnnxNode) -> Value:
    """BatchNormalization; statistics of the batch in train mode, whatever mode the file was exported in."""
    source = traced(b, node)
    names = dict(zip(("weight", "bias", "running_mean", "running_var"), node.inputs[1:5], strict=True))
    if not all(names[role] in b.initializers for role in ("running_mean", "running_var")):
        raise UnsupportedModuleError(f"the running statistics of {node.name!r} are no tensors of the file")
    affine = names["weight"] in b.initializers and names["bias"] in b.initializers
    if not affine:
        scale, shift = b.value(names.pop("weight")), b.value(names.pop("bias"))
        plain = isinstance(scale, torch.Tensor) and bool((scale == 1).all())
        if not plain or not isinstance(shift, torch.Tensor) or bool(shift.any()):
            raise UnsupportedModuleError(f"scale and shift of {node.name!r} are no tensors of the file")

    def build() -> nn.Module:
        return BATCH_NORMS[rank_of(source)](
            len(b.initializers[names["running_mean"]]),
            eps=node.attributes.get("epsilon", 1e-5),
            momentum=1.0 - node.attributes.get("momentum", 0.9),
            affine=affine,
        )

    return _place(b, node, build, source, names)


def layer_norm(b: Builder, node: OnnxNode) -> Value:
    """LayerNormalization."""
    source, name = traced(b, node), node.inputs[1]
    axis, epsilon = node.attributes.get("axis", -1), node.attributes.get("epsilon", 1e-5)
    shape = tuple(source.single.shape[axis:])
    bias, constant = _bias(b, node.input(2))
    if name not in b.initializers or constant is not None:
        operands = [b.value(name), b.value(node.inputs[2]) if node.input(2) else None]
        return b.call(functional.layer_norm, source, shape, *operands, epsilon)  # type: ignore[no-any-return]
    return _place(
        b, node, lambda: nn.LayerNorm(shape, epsilon, bias=bool(bias)), source, {"weight": name, "bias": bias}
    )


def rms_norm(b: Builder, node: OnnxNode) -> Value:
    """RMSNormalization."""
    source, name = traced(b, node), node.inputs[1]
    shape = tuple(source.single.shape[node.attributes.get("axis", -1) :])
    epsilon = node.attributes.get("epsilon", 1e-5)
    if name not in b.initializers:
        return b.call(functional.rms_norm, source, shape, b.value(name), epsilon)  # type: ignore[no-any-return]
    return _place(b, node, lambda: nn.RMSNorm(shape, epsilon), source, {"weight": name})


def group_norm(b: Builder, node: OnnxNode) -> Value:
    """GroupNormalization."""
    source, groups = traced(b, node), node.attributes["num_groups"]
    epsilon = node.attributes.get("epsilon", 1e-5)
    if not all(name in b.initializers for name in node.inputs[1:3]):
        operands = [b.value(name) for name in node.inputs[1:3]]
        return b.call(functional.group_norm, source, groups, *operands, epsilon)  # type: ignore[no-any-return]
    channels = source.single.shape[1]
    weights = {"weight": node.inputs[1], "bias": node.inputs[2]}
    return _place(b, node, lambda: nn.GroupNorm(groups, channels, epsilon), source, weights)


def instance_norm(b: Builder, node: OnnxNode) -> Value:
    """InstanceNormalization."""
    source, epsilon = traced(b, node), node.attributes.get("epsilon", 1e-5)
    if not all(name in b.initializers for name in node.inputs[1:3]):
        operands = [b.value(name) for name in node.inputs[1:3]]
        return b.call(functional.instance_norm, source, None, None, *operands, eps=epsilon)  # type: ignore[no-any-return]
    layer = INSTANCE_NORMS[rank_of(source)]
    channels = source.single.shape[1]
    weights = {"weight": node.inputs[1], "bias": node.inputs[2]}
    return _place(b, node, lambda: layer(channels, epsilon, affine=True), source, weights)


def linear(b: Builder, node: OnnxNode) -> Value:
    """Gemm."""
    source, name = traced(b, node), node.inputs[1]
    attributes = node.attributes
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
        return result  # type: ignore[no-any-return]
    return b.call(torch.add, result, b.call(torch.mul, b.value(node.inputs[2]), attributes.get("beta", 1.0)))  # type: ignore[no-any-return]


def matrix_product(b: Builder, node: OnnxNode) -> Value:
    """MatMul; with a matrix of the file, and a bias that is added next, a linear layer."""
    first, name = b.value(node.inputs[0]), node.inputs[1]
    known = b.values.get(name)
    turned = known.transposed if isinstance(known, Traced) else ""
    weight = turned or name
    is_layer = isinstance(first, Traced) and weight in b.initializers and b.initializers[weight].dim() == 2
    if not is_layer or (known is not None and not turned):
        return b.call(torch.matmul, first, b.value(name))  # type: ignore[no-any-return]
    assert isinstance(first, Traced)
    bias = _bias_that_follows(b, node, b.initializers[weight].shape[0 if turned else 1])
    path = weight.removesuffix(".weight")
    is_shared = b.has_path(path) and not b.holds_only(path, {"weight": weight, "bias": bias})
    if turned and (is_shared or not _named_like_layer(weight, bias)):
        return b.call(functional.linear, first, b.parameter(weight))  # type: ignore[no-any-return]
    result = _linear(b, node, first, weight, bias, transposed=not turned)
    if bias:
        assert node.follower is not None
        b.absorbed[node.follower.outputs[0]] = result
    b.tensors[str(result.node.target)] = node.inputs[0], (node.follower if bias else node).outputs[0]  # type: ignore[union-attr]
    return result


def _bias_that_follows(b: Builder, node: OnnxNode, outputs: int) -> str:
    """Name of the vector that the only reader of a product adds to it, empty without one."""
    if node.follower is None or node.follower.op_type != "Add":
        return ""
    others = [name for name in node.follower.inputs if name != node.outputs[0]]
    fits = len(others) == 1 and others[0] in b.initializers and tuple(b.initializers[others[0]].shape) == (outputs,)
    return others[0] if fits else ""


def _linear(b: Builder, node: OnnxNode, source: Traced, name: str, bias: str, *, transposed: bool) -> Traced:
    rows, columns = b.initializers[name].shape
    outputs, inputs = (columns, rows) if transposed else (rows, columns)
    weights = {"weight": name, "bias": bias}
    return _place(b, node, lambda: nn.Linear(inputs, outputs, bias=bool(bias)), source, weights, transposed=transposed)


# ---- layers without weights ------------------------------------------------------------------------------------------

MAX_POOLS = {3: functional.max_pool1d, 4: functional.max_pool2d, 5: functional.max_pool3d}
MEAN_POOLS: dict[int, Callable[..., Any]] = {
    3: functional.avg_pool1d,
    4: functional.avg_pool2d,
    5: functional.avg_pool3d,
}


class Bernoulli(nn.Module):
    """Ones with a probability, zeros else: dropout and stochastic depth as exporters write them; the mean in eval mode.

    Args:
        probability: Of a one.
        shape: Of what is drawn for one sample, or ``None``: that of the input.
    """

    def __init__(self, probability: float, shape: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.probability, self.shape = probability, shape

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """A tensor like ``inputs``, or (B, *shape) of its type."""
        shape = inputs.shape if self.shape is None else (len(inputs), *self.shape)
        means = inputs.new_full(shape, self.probability)
        return torch.bernoulli(means) if self.training else means

    def extra_repr(self) -> str:
        """The probability."""
        return f"{self.probability}"


def dropout(b: Builder, node: OnnxNode) -> Value:
    """Dropout, active in train mode."""
    ratio: Any = node.attributes.get("ratio", 0.5)
    if node.input(1):
        ratio = b.value(node.inputs[1])
        if not isinstance(ratio, torch.Tensor):
            raise UnsupportedModuleError(f"the ratio of {node.name!r} depends on the input")
    return b.module(b.free_path("dropouts.d"), nn.Dropout(float(ratio)), traced(b, node))


def random_comparison(b: Builder, node: OnnxNode) -> Value | None:
    """Less of a random tensor and a number, as dropout is written; ``None`` where it is another comparison."""
    if node.inputs[0] not in b.random:
        return None
    like, bound = b.random[node.inputs[0]], b.value(node.inputs[1])
    if not isinstance(bound, torch.Tensor) or bound.numel() != 1:
        raise UnsupportedModuleError(f"{node.name!r} compares random numbers with values of the input")
    path = b.free_path("dropouts.d")
    if isinstance(like, Traced):
        return b.module(path, Bernoulli(float(bound)), like)
    assert b.entry is not None
    return b.module(path, Bernoulli(float(bound), tuple(like.shape[1:])), b.entry)


def random_uniform(b: Builder, node: OnnxNode) -> Value:
    """RandomUniformLike from 0 to 1; only what compares it with a number makes sense of it."""
    if (node.attributes.get("low", 0.0), node.attributes.get("high", 1.0)) != (0.0, 1.0):
        raise UnsupportedModuleError(f"{node.name!r} draws from another range than 0 to 1")
    like = b.value(node.inputs[0])
    b.random[node.outputs[0]] = like
    return like


def max_pool(b: Builder, node: OnnxNode) -> Value:
    """MaxPool."""
    source = traced(b, node)
    spatial = rank_of(source) - 2
    source, padding = padded(b, source, node, spatial)
    kernel = tuple(node.attributes["kernel_shape"])
    strides = tuple(node.attributes.get("strides", [1] * spatial))
    dilations = tuple(node.attributes.get("dilations", [1] * spatial))
    ceil = bool(node.attributes.get("ceil_mode", 0))
    return b.call(MAX_POOLS[spatial + 2], source, kernel, strides, padding, dilations, ceil_mode=ceil)  # type: ignore[no-any-return]


def mean_pool(b: Builder, node: OnnxNode) -> Value:
    """AveragePool."""
    source = traced(b, node)
    spatial = rank_of(source) - 2
    counted = bool(node.attributes.get("count_include_pad", 0))
    plain = source
    source, padding = padded(b, source, node, spatial)
    if source is not plain and not counted:
        raise UnsupportedModuleError(f"{node.name!r} averages over uneven padding without counting it")
    kernel, strides = tuple(node.attributes["kernel_shape"]), tuple(node.attributes.get("strides", [1] * spatial))
    ceil = bool(node.attributes.get("ceil_mode", 0))
    return b.call(MEAN_POOLS[spatial + 2], source, kernel, strides, padding, ceil, counted)  # type: ignore[no-any-return]


def global_mean_pool(b: Builder, node: OnnxNode) -> Value:
    """GlobalAveragePool."""
    source = traced(b, node)
    return b.call(torch.mean, source, dim=tuple(range(2, rank_of(source))), keepdim=True)  # type: ignore[no-any-return]


def global_max_pool(b: Builder, node: OnnxNode) -> Value:
    """GlobalMaxPool."""
    source = traced(b, node)
    return b.call(torch.amax, source, dim=tuple(range(2, rank_of(source))), keepdim=True)  # type: ignore[no-any-return]


def local_response_norm(b: Builder, node: OnnxNode) -> Value:
    """LRN."""
    attributes = node.attributes
    options = [
        attributes["size"],
        attributes.get("alpha", 1e-4),
        attributes.get("beta", 0.75),
        attributes.get("bias", 1.0),
    ]
    return b.call(functional.local_response_norm, traced(b, node), *options)  # type: ignore[no-any-return]


LAYERS: dict[str, Callable[[Builder, OnnxNode], Value | None]] = {
    "Conv": convolution,
    "BatchNormalization": batch_norm,
    "LayerNormalization": layer_norm,
    "RMSNormalization": rms_norm,
    "GroupNormalization": group_norm,
    "InstanceNormalization": instance_norm,
    "Gemm": linear,
    "MatMul": matrix_product,
    "Dropout": dropout,
    "Less": random_comparison,
    "RandomUniformLike": random_uniform,
    "MaxPool": max_pool,
    "AveragePool": mean_pool,
    "GlobalAveragePool": global_mean_pool,
    "GlobalMaxPool": global_max_pool,
    "LRN": local_response_norm,
}
