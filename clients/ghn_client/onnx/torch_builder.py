"""Builds a ``torch.fx`` graph node by node while running it, so that every shape is known and the batch stays free.

Everything runs twice, on an example batch and on three times as many samples, of which the example is the first third.
Shapes that the file computes or that an exporter froze hold for the example; where the two runs differ in size, and by
value in order, is the batch: ``Reshape`` and ``Expand`` to a frozen shape get a free size in that place.

B example batch      P number of elements of a tensor, in memory order, before its batch index
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from ghn_client.errors import UnsupportedModuleError

#: How many times as many samples the second run has.
FACTOR = 3


@dataclass(frozen=True, eq=False)
class Traced:
    """A value that depends on the input or on a parameter."""

    node: fx.Node
    single: Any  # its value on the example batch
    several: Any  # its value on the larger batch
    parameter: str = ""  # name of the initializer that it is
    transposed: str = ""  # name of the initializer of which it is the matrix transpose


#: Constants are plain tensors.
Value = Traced | torch.Tensor


def example_of(value: Value) -> torch.Tensor:
    """The value on the example batch."""
    return value.single if isinstance(value, Traced) else value


class Constant(nn.Module):
    """A tensor that is no parameter and in no ``state_dict``."""

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value, persistent=False)

    def forward(self) -> torch.Tensor:
        """The tensor."""
        return self.get_buffer("value")


class Builder:
    """The graph while it is built, for an input of which the larger batch holds variations of ``example`` too.

    Besides the weights of layers, those initializers are trainable that ``parameters`` names: ``None`` for all float
    vectors and matrices.
    """

    def __init__(
        self,
        initializers: Mapping[str, torch.Tensor],
        parameters: Collection[str] | None,
        input_name: str,
        example: torch.Tensor,
    ) -> None:
        several = torch.cat([example * (1.0 + 0.3 * index) + 0.1 * index for index in range(FACTOR)])
        self.batch_size = len(example)
        self.initializers = initializers
        self.parameters = parameters
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.entry = Traced(self.graph.placeholder("inputs"), example, several)
        self.values: dict[str, Value] = {input_name: self.entry}
        self.names: dict[str, tuple[str, bool]] = {}  # parameter path -> initializer, whether it is transposed
        self.tensors: dict[str, tuple[str, str]] = {}  # path of a linear layer -> its input and output in the file
        self.layers: dict[tuple[str, ...], str] = {}  # operator and initializers -> path of their layer
        self.absorbed: dict[str, Value] = {}  # outputs of nodes that are a part of an earlier layer
        self.random: dict[str, Value] = {}  # outputs of random nodes -> what they have the shape of
        self._constants: dict[int, tuple[torch.Tensor, fx.Node]] = {}

    # ---- values -----------------------------------------------------------------------------------------------------

    def value(self, name: str) -> Any:
        """What a name in the file stands for: a ``Traced``, or a tensor that is constant."""
        if name not in self.values:
            if name not in self.initializers:
                raise UnsupportedModuleError(f"the file has no value {name!r}; its weights may be missing")
            tensor = self.initializers[name]
            is_weight = tensor.is_floating_point() and tensor.dim() > 0 and tensor.numel() > 1
            if self.parameters is not None:
                is_weight = name in self.parameters
            self.values[name] = self.parameter(name) if is_weight else tensor
        return self.values[name]

    def parameter(self, name: str) -> Traced:
        """An initializer as a parameter of its own, at its name."""
        path = next((place for place, owned in self.names.items() if owned == (name, False)), "")
        if not path:
            path = legal_path(name)
            parent, _, leaf = path.rpartition(".")
            _container(self.root, parent).register_parameter(leaf, nn.Parameter(self.initializers[name].clone()))
            self.names[path] = (name, False)
        tensor = self.root.get_parameter(path).detach()
        return Traced(self.graph.get_attr(path), tensor, tensor, parameter=name)

    def has_path(self, path: str) -> bool:
        """Whether something is at a dotted path already."""
        current: Any = self.root
        for part in path.split("."):
            if not hasattr(current, part):
                return False
            current = getattr(current, part)
        return True

    def holds_only(self, path: str, weights: Mapping[str, str]) -> bool:
        """Whether nothing is at a path but parameters that a layer there would have, by role and initializer."""
        held = self.root.get_submodule(path) if path in dict(self.root.named_modules()) else None
        if type(held) is not nn.Module or held._modules:
            return False
        return all(self.names.get(f"{path}.{role}") == (weights.get(role), False) for role in held._parameters)

    def free_path(self, stem: str) -> str:
        """``stem`` with the first number that is not taken."""
        return next(f"{stem}{index}" for index in count() if not self.has_path(f"{stem}{index}"))

    # ---- nodes ------------------------------------------------------------------------------------------------------

    def call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Calls a function: in the graph if an argument is traced, right away otherwise."""
        everything = (arguments, options)
        if not any(isinstance(leaf, Traced) for leaf in tree_leaves(everything)):
            return function(*arguments, **options)
        positional, named = tree_map(self._argument, everything)
        node = self.graph.call_function(function, positional, named)
        first, other = (tree_map(partial(_run, run), everything) for run in ("single", "several"))
        return Traced(node, function(*first[0], **first[1]), function(*other[0], **other[1]))

    def module(self, path: str, module: nn.Module, *arguments: Traced) -> Traced:
        """Calls a module, which is put at a dotted path in eval mode unless it is there."""
        if not self.has_path(path) or self.root.get_submodule(path) is not module:
            parent, _, leaf = path.rpartition(".")
            _container(self.root, parent).add_module(leaf, module.eval())
        node = self.graph.call_module(path, tuple(argument.node for argument in arguments))
        single = module(*(argument.single for argument in arguments))
        return Traced(node, single, module(*(argument.several for argument in arguments)))

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Traced):
            return value.node
        if not isinstance(value, torch.Tensor):
            return value
        if value.dim() == 0:
            return value.item()
        if id(value) not in self._constants:
            name = f"c{len(self._constants)}"
            _container(self.root, "constants").add_module(name, Constant(value))
            self._constants[id(value)] = value, self.graph.call_module(f"constants.{name}")
        return self._constants[id(value)][1]

    # ---- shapes -----------------------------------------------------------------------------------------------------

    def reshape(self, value: Traced, shape: Sequence[int]) -> Any:
        """``value`` in a shape that holds for the example, with a free size where the batch is."""
        if value.single.numel() == value.several.numel():
            return self.call(torch.reshape, value, tuple(shape))
        resolved = list(value.single.reshape(tuple(shape)).shape)
        resolved[_batch_axis(resolved, batch_position(value))] = -1
        return self.call(torch.reshape, value, tuple(resolved))

    def expand(self, value: Traced, shape: Sequence[int]) -> Any:
        """``value`` broadcast to a shape that holds for the example."""
        target = list(np.broadcast_shapes(value.single.shape, tuple(shape)))
        offset = len(target) - value.single.dim()
        for axis, (one, more) in enumerate(zip(value.single.shape, value.several.shape, strict=True)):
            if one != more:
                target[offset + axis] = -1
        return self.call(torch.Tensor.expand, value, tuple(target))


def batch_position(value: Traced) -> int:
    """P of a value whose runs differ in size; refused where the larger run is no batch of single ones."""
    single, several = value.single.flatten(), value.several.flatten()
    candidates: list[int] = [1] + [math.prod(value.single.shape[: axis + 1]) for axis in range(value.single.dim())]
    for before in dict.fromkeys(candidates):
        if single.numel() * FACTOR != several.numel():
            break
        first: torch.Tensor = several.view(before, FACTOR, -1)[:, 0].flatten()
        if torch.allclose(first, single, rtol=1e-3, atol=1e-5 * float(single.abs().max()) + 1e-12):
            return before
    raise UnsupportedModuleError(
        f"{value.node.name} has shape {tuple(value.single.shape)} for the example and {tuple(value.several.shape)} for"
        f" a batch {FACTOR} times as large, and is no batch of the same: export the network with a batch size of 1 or"
        " with a dynamic batch axis"
    )


def _batch_axis(shape: Sequence[int], before: int) -> int:
    """In which axis of ``shape`` the batch is that has ``before`` elements before it.

    Where the batch is between two axes, it belongs to an axis of size 1 there, else to the second of them (heads of
    attention), unless that is the last one (features).
    """
    passed = 1
    for axis, size in enumerate(shape):
        if passed == before:
            alone = [k for k in range(axis, len(shape)) if math.prod(shape[axis:k]) == 1 and shape[k] == 1]
            if alone:
                return alone[0]
            return axis if axis < len(shape) - 1 or axis == 0 else axis - 1
        if passed * size > before:
            return axis
        passed *= size
    return len(shape) - 1


def legal_path(name: str) -> str:
    """A dotted path of attributes for a name in the file."""
    return ".".join(part.replace("/", "_").replace(":", "_") for part in name.strip("/.").split(".") if part)


def _container(root: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path; plain modules are made where there is none."""
    for part in path.split(".") if path else ():
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    return root


def _run(run: str, value: Any) -> Any:
    if isinstance(value, Traced):
        return getattr(value, run)
    return value.item() if isinstance(value, torch.Tensor) and value.dim() == 0 else value
