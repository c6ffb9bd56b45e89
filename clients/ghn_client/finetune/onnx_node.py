"""What the layers of an ONNX file have in common: the node, its source, and its padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.nn import functional

from ghn_client.errors import UnsupportedModuleError
from ghn_client.finetune.onnx_builder import Builder, Traced


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
