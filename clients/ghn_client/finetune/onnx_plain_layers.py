"""ONNX layers without weights: dropout in the ways that exporters write it, pooling, local response norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ghn_client.errors import UnsupportedModuleError
from ghn_client.finetune.onnx_builder import Builder, Traced, Value
from ghn_client.finetune.onnx_node import OnnxNode, padded, traced
from ghn_client.finetune.onnx_shapes import rank_of

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


PLAIN_LAYERS: dict[str, Callable[[Builder, OnnxNode], Value | None]] = {
    "Dropout": dropout,
    "Less": random_comparison,
    "RandomUniformLike": random_uniform,
    "MaxPool": max_pool,
    "AveragePool": mean_pool,
    "GlobalAveragePool": global_mean_pool,
    "GlobalMaxPool": global_max_pool,
    "LRN": local_response_norm,
}
