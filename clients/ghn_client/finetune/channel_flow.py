"""Follows every channel through a network: which channels are one and the same wire, and which are constant.

A wire is a channel that several layers share: a convolution's output, the BatchNorm behind it, both sides of a residual
addition. A wire can be cut when every layer that mixes channels (convolution, linear) reads a known constant from it,
since the constant can move into that layer's bias. What is not understood blocks the wires that it touches.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from ghn_client.finetune.norm_layers import norm_kind

#: Modules that act on every number alone; they are applied to constants as they are.
ELEMENTWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh,
    nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softplus, nn.Softsign, nn.Identity, nn.Dropout, nn.Dropout2d,
)  # fmt: skip
#: Functions of the same kind.
ELEMENTWISE_FUNCTIONS = (
    torch.relu, functional.relu, functional.relu6, functional.leaky_relu, functional.elu, functional.gelu,
    functional.silu, functional.mish, torch.sigmoid, torch.tanh, functional.hardtanh, functional.hardswish,
    functional.hardsigmoid, functional.softplus, torch.clamp, operator.neg,
)  # fmt: skip
ELEMENTWISE_METHODS = ("relu", "relu_", "sigmoid", "tanh", "clamp", "contiguous", "clone", "neg")
DROPOUTS = (functional.dropout, functional.dropout2d)
ADDITIONS = (operator.add, operator.iadd, torch.add)
SUBTRACTIONS = (operator.sub, operator.isub, torch.sub)
PRODUCTS = (operator.mul, operator.imul, torch.mul)
#: Pools that leave a constant channel constant.
POOL_MODULES = (nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample)
POOL_FUNCTIONS = (functional.max_pool2d, functional.adaptive_avg_pool2d, functional.adaptive_max_pool2d)


@dataclass(eq=False)
class Signal:
    """Channels of one tensor.

    Attributes:
        wires: (C,) wire numbers, int64.
        constants: (C,) float64, NaN where the channel is not constant.
        axis: 1 or -1, where the channels are.
    """

    wires: torch.Tensor
    constants: torch.Tensor
    axis: int = 1


@dataclass(eq=False)
class LayerUse:
    """How a layer with weights is used.

    Attributes:
        name: Dotted path.
        reads: Wires of its input channels, ``None`` if it does not mix channels.
        constants: What it reads from them.
        writes: Wires of its output channels.
    """

    name: str
    reads: torch.Tensor | None
    constants: torch.Tensor | None
    writes: torch.Tensor


@dataclass(eq=False)
class Wires:
    """A union-find of wires with reasons why some may not be cut."""

    parents: list[int] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)

    def fresh(self, count: int) -> torch.Tensor:
        """Numbers of ``count`` new wires."""
        start = len(self.parents)
        self.parents += range(start, start + count)
        return torch.arange(start, start + count)

    def root(self, wire: int) -> int:
        """The number that stands for all wires joined with ``wire``."""
        while self.parents[wire] != wire:
            self.parents[wire] = self.parents[self.parents[wire]]
            wire = self.parents[wire]
        return wire

    def join(self, first: torch.Tensor, second: torch.Tensor) -> None:
        """Makes two lists of wires one, pair by pair."""
        for a, b in zip(first.tolist(), second.tolist(), strict=True):
            root_a, root_b = self.root(a), self.root(b)
            if root_a != root_b:
                self.parents[root_b] = root_a
                if root_b in self.reasons:
                    self.reasons.setdefault(root_a, self.reasons.pop(root_b))

    def block(self, wires: torch.Tensor, reason: str) -> None:
        """Forbids cutting these wires."""
        for wire in wires.tolist():
            self.reasons.setdefault(self.root(wire), reason)

    def roots(self, wires: torch.Tensor) -> torch.Tensor:
        """The standing number of every wire."""
        return torch.tensor([self.root(wire) for wire in wires.tolist()], dtype=torch.long)


class ChannelFlow(fx.Interpreter):
    """Runs a traced network on an example and records wires, constants and layer uses.

    Args:
        traced: The network, in eval mode, with shapes taken from the example at run time.
    """

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced)
        self.wires = Wires()
        self.uses: dict[str, LayerUse] = {}
        self.signals: dict[fx.Node, Signal] = {}
        self.called: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Computes the node as usual, then its signal."""
        result = super().run_node(n)
        if n.op == "output":
            for node in n.all_input_nodes:
                self._block(node, "it reaches the output")
            return result
        signal = self._signal(n, result)
        if signal is not None:
            self.signals[n] = signal
        return result

    def _signal(self, node: fx.Node, result: Any) -> Signal | None:
        if not isinstance(result, torch.Tensor):
            if not _reads_shape_only(node):
                self._block_inputs(node, f"{node.target} is not followed")
            return None
        if node.op == "call_module":
            return self._module(node, result)
        if node.op in ("call_function", "call_method"):
            return self._function(node, result)
        return self._opaque(node, result, f"{node.op} {node.target}")

    def _opaque(self, node: fx.Node, result: torch.Tensor, reason: str) -> Signal | None:
        self._block_inputs(node, reason)
        if result.dim() < 2:
            return None
        wires = self.wires.fresh(result.shape[1])
        self.wires.block(wires, reason)
        return Signal(wires, torch.full((len(wires),), torch.nan, dtype=torch.float64))

    def _module(self, node: fx.Node, result: torch.Tensor) -> Signal | None:
        name = str(node.target)
        layer = self.module.get_submodule(name)
        given = self._input(node)
        self.called[name] = self.called.get(name, 0) + 1
        if given is None or (self.called[name] > 1 and list(layer.parameters())):
            if name in self.uses:
                self._block_use(self.uses[name], f"{name} is used more than once")
            return self._opaque(node, result, f"{name} is used in a way that is not followed")
        if isinstance(layer, nn.Conv2d):
            return self._convolution(node, name, layer, given, result)
        if isinstance(layer, nn.Linear):
            return self._linear(name, layer, given, node, result)
        if norm_kind(layer) in ("batch_norm", "instance_norm") and type(layer).__module__.startswith("torch.nn"):
            return self._norm(name, layer, given)
        if isinstance(layer, ELEMENTWISE_MODULES):
            return Signal(given.wires, _apply(layer, given.constants), given.axis)
        if isinstance(layer, POOL_MODULES) or (isinstance(layer, nn.AvgPool2d) and layer.padding in (0, (0, 0))):
            return given
        if isinstance(layer, nn.Flatten) and layer.start_dim == 1:
            return self._flatten(given, node, result)
        return self._opaque(node, result, f"{type(layer).__name__} {name} is not followed")

    def _convolution(
        self, node: fx.Node, name: str, layer: nn.Conv2d, given: Signal, result: torch.Tensor
    ) -> Signal | None:
        pads = layer.padding not in ((0, 0), "valid") and layer.padding_mode == "zeros"
        if layer.groups == 1:
            if pads:
                moving = given.constants.isfinite() & (given.constants != 0)
                self.wires.block(given.wires[moving], f"its constant does not reach the zero padding of {name}")
            return self._mixing(name, given, layer.out_channels)
        if layer.groups == layer.in_channels == layer.out_channels:
            weight = layer.weight.detach().double().flatten(1).sum(1)
            bias = torch.zeros_like(weight) if layer.bias is None else layer.bias.detach().double()
            constants = weight * given.constants + bias
            if pads:
                constants = torch.where(given.constants == 0, constants, torch.nan)
            self.uses[name] = LayerUse(name, None, None, given.wires)
            return Signal(given.wires, constants)
        return self._opaque(node, result, f"{name} is a grouped convolution")

    def _linear(self, name: str, layer: nn.Linear, given: Signal, node: fx.Node, result: torch.Tensor) -> Signal | None:
        if result.dim() != 2 and given.axis != -1:
            return self._opaque(node, result, f"{name} mixes another axis than the channels")
        signal = self._mixing(name, given, layer.out_features)
        signal.axis = 1 if result.dim() == 2 else -1
        return signal

    def _mixing(self, name: str, given: Signal, outputs: int) -> Signal:
        wires = self.wires.fresh(outputs)
        self.uses[name] = LayerUse(name, given.wires, given.constants, wires)
        return Signal(wires, torch.full((outputs,), torch.nan, dtype=torch.float64))

    def _norm(self, name: str, layer: nn.Module, given: Signal) -> Signal:
        weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
        channels = len(given.wires)
        scale = torch.ones(channels).double() if weight is None else weight.detach().double().cpu()
        shift = torch.zeros(channels).double() if bias is None else bias.detach().double().cpu()
        if getattr(layer, "running_mean", None) is not None:
            variance = layer.get_buffer("running_var").double().cpu()
            epsilon: Any = layer.eps
            slope = scale * torch.rsqrt(variance + float(epsilon))
            through = slope * (given.constants - layer.get_buffer("running_mean").double().cpu()) + shift
        else:
            through = torch.where(given.constants.isfinite(), shift, torch.nan)
        self.uses[name] = LayerUse(name, None, None, given.wires)
        return Signal(given.wires, torch.where(scale == 0, shift, through), given.axis)

    def _function(self, node: fx.Node, result: torch.Tensor) -> Signal | None:
        target, given = node.target, self._input(node)
        tensors = [argument for argument in node.args if isinstance(argument, fx.Node) and argument in self.signals]
        if target in (torch.cat, torch.concat):
            return self._concatenate(node, result)
        binary: dict[tuple[Any, ...], Any] = {ADDITIONS: torch.add, SUBTRACTIONS: torch.sub, PRODUCTS: torch.mul}
        for names, function in binary.items():
            if target in names or (node.op == "call_method" and str(target).strip("_") == function.__name__):
                return self._binary(node, result, function)
        if given is None or len(tensors) != 1:
            return self._opaque(node, result, f"{target} is not followed")
        if target in DROPOUTS:
            return given
        if target in ELEMENTWISE_FUNCTIONS or (node.op == "call_method" and target in ELEMENTWISE_METHODS):
            options = {key: value for key, value in node.kwargs.items() if key != "inplace"}
            if any(isinstance(value, fx.Node) for value in (*node.args[1:], *options.values())):
                return self._opaque(node, result, f"{target} has computed options")
            elementwise: Any = target if node.op == "call_function" else _method(str(target))
            return Signal(given.wires, _apply(elementwise, given.constants, *node.args[1:], **options), given.axis)
        if target in POOL_FUNCTIONS or (target is functional.avg_pool2d and not _padded(node)):
            return given
        if _is_spatial_mean(node, result, given):
            return Signal(given.wires, given.constants, 1)
        if _is_spatial_slice(node, given):
            return given
        if _is_flatten(node):
            return self._flatten(given, node, result)
        return self._opaque(node, result, f"{target} is not followed")

    def _binary(self, node: fx.Node, result: torch.Tensor, function: Callable[..., torch.Tensor]) -> Signal | None:
        signals = [self.signals.get(argument) for argument in node.args if isinstance(argument, fx.Node)]
        if len(node.args) != 2 or node.kwargs or not signals or None in signals:
            return self._opaque(node, result, f"{node.target} has an operand that is not followed")
        if len(signals) == 1:
            (only,) = signals
            assert only is not None
            operands = [only.constants if isinstance(argument, fx.Node) else argument for argument in node.args]
            return Signal(only.wires, function(*operands), only.axis)
        first, second = signals
        assert first is not None
        assert second is not None
        same = len(first.wires) == len(second.wires) and first.axis == second.axis
        if not same or result.shape[first.axis] != len(first.wires):
            return self._opaque(node, result, f"{node.target} broadcasts channels")
        self.wires.join(first.wires, second.wires)
        constants = function(first.constants, second.constants)
        if function is torch.mul:
            constants = torch.where((first.constants == 0) | (second.constants == 0), 0.0, constants)
        return Signal(first.wires, constants, first.axis)

    def _concatenate(self, node: fx.Node, result: torch.Tensor) -> Signal | None:
        parts = node.args[0] if node.args else ()
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        signals = [self.signals.get(part) for part in parts if isinstance(part, fx.Node)]  # type: ignore[union-attr]
        known = [signal for signal in signals if signal is not None and signal.axis == 1]
        if dim != 1 or not known or len(known) != len(parts):  # type: ignore[arg-type]
            return self._opaque(node, result, "a concatenation that is not along the channels")
        return Signal(torch.cat([s.wires for s in known]), torch.cat([s.constants for s in known]))

    def _flatten(self, given: Signal, node: fx.Node, result: torch.Tensor) -> Signal | None:
        if given.axis != 1 or result.dim() != 2 or result.shape[1] % len(given.wires):
            return self._opaque(node, result, f"{node.target} reorders channels")
        repeats = result.shape[1] // len(given.wires)
        return Signal(given.wires.repeat_interleave(repeats), given.constants.repeat_interleave(repeats))

    def _input(self, node: fx.Node) -> Signal | None:
        first = node.args[0] if node.args else None
        return self.signals.get(first) if isinstance(first, fx.Node) else None

    def _block(self, node: fx.Node, reason: str) -> None:
        if node in self.signals:
            self.wires.block(self.signals[node].wires, reason)

    def _block_inputs(self, node: fx.Node, reason: str) -> None:
        for given in node.all_input_nodes:
            self._block(given, reason)

    def _block_use(self, use: LayerUse, reason: str) -> None:
        self.wires.block(use.writes, reason)
        if use.reads is not None:
            self.wires.block(use.reads, reason)


def _apply(function: Any, constants: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
    """``function`` of every constant; NaN stays NaN."""
    with torch.no_grad():
        values: torch.Tensor = function(constants.clone(), *args, **options)
    return torch.where(constants.isnan(), torch.nan, values)


def _method(name: str) -> Callable[..., torch.Tensor]:
    return lambda tensor, *args, **options: getattr(tensor, name)(*args, **options)


def _reads_shape_only(node: fx.Node) -> bool:
    sources = node.all_input_nodes
    shape_call = (node.op == "call_method" and node.target in ("size", "dim")) or (
        node.op == "call_function" and node.target is getattr and node.args[1] in ("shape", "ndim")
    )
    return shape_call or not sources or node.target is operator.getitem


def _padded(node: fx.Node) -> bool:
    padding = node.args[3] if len(node.args) > 3 else node.kwargs.get("padding", 0)
    return padding not in (0, (0, 0))


def _is_spatial_mean(node: fx.Node, result: torch.Tensor, given: Signal) -> bool:
    is_mean = node.target is torch.mean or (node.op == "call_method" and node.target == "mean")
    axes = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    spatial = axes in ((2, 3), [2, 3], (-2, -1), [-2, -1], (3, 2), (-1, -2))
    return is_mean and spatial and given.axis == 1 and len(given.wires) == int(result.shape[1])


def _is_spatial_slice(node: fx.Node, given: Signal) -> bool:
    """``x[:, :, ::2, ::2]``: positions are left out, channels are not."""
    index = node.args[1] if node.target is operator.getitem else None
    return isinstance(index, tuple) and index[:2] == (slice(None), slice(None)) and given.axis == 1


def _is_flatten(node: fx.Node) -> bool:
    """``flatten(x, 1)`` or ``x.view(batch, -1)``; a view with a written-out width would not survive pruning."""
    if node.target in (torch.flatten, "flatten"):
        start = node.args[1] if len(node.args) > 1 else node.kwargs.get("start_dim", 0)
        return bool(start == 1) and len(node.args) <= 2
    return node.op == "call_method" and node.target in ("view", "reshape") and node.args[2:] == (-1,)
