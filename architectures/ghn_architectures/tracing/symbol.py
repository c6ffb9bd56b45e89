"""``Symbol`` stands for a tensor while a network's ``forward`` is run to find its graph; ``Recorder`` collects nodes.

A symbol knows the shape of the tensor and the graph nodes that the tensor comes from. It answers torch's functions
through ``__torch_function__`` with the rules of ``operations.py``; an operation without a rule is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ghn_service.errors import InvalidArchitectureError, UnsupportedArchitectureError
from ghn_service.graph.architecture import ParameterSpec
from ghn_service.graph.raw_graph import NOTHING, Flow, GraphLimits, RawGraph, RawNode, Source, TensorUse

Rule = Callable[..., Any]
RULES: dict[Any, Rule] = {}


def rule(*functions: Any) -> Callable[[Rule], Rule]:
    """Registers the decorated function as the meaning of torch's ``functions``."""

    def register(implementation: Rule) -> Rule:
        RULES.update(dict.fromkeys(functions, implementation))
        return implementation

    return register


class Recorder:
    """The raw graph of a network that is being traced, and the cost of the operations met.

    Attributes:
        graph: Nodes in order of execution.
        sources: The network's parameters by ``id``, in the order of ``named_parameters``.
        multiply_adds: Multiplications with addition of all convolutions, linear layers and attention, per example.
        activation_elements: Elements of all tensors that operations wrote, per example.
    """

    def __init__(self, module: nn.Module) -> None:
        self.graph = RawGraph(GraphLimits(), is_ordered=True)
        self.sources = {
            id(parameter): Source(name, name, tuple(parameter.shape), "PARAMETER")
            for name, parameter in module.named_parameters()
        }
        self.multiply_adds = 0
        self.activation_elements = 0

    def operation(self, op_type: str, level: int, flow: Flow, **more: Any) -> Flow:
        """Records an operation without parameters that reads ``flow``; returns where its result comes from."""
        return frozenset({self.graph.add(RawNode(op_type, level, name=op_type, predecessors=set(flow), **more))})

    def parameter(self, op_type: str, level: int, tensor: torch.Tensor, flow: Flow, **more: Any) -> int:
        """Records a parameter that acts on ``flow``; returns the index of its node."""
        use = self.use(tensor, level, is_scale=op_type in ("bn", "ln"))
        name = use.source.name
        return self.graph.add(RawNode(op_type, level, name=name, predecessors=set(flow), weight=use, **more))

    def use(self, tensor: torch.Tensor, level: int, *, is_scale: bool = False, fallback: str = "") -> TensorUse:
        """Records that a parameter is used: by a node, or with ``fallback``, the rule that initialises it, by none.

        Raises:
            InvalidArchitectureError: The tensor is used twice, or is no parameter of the network.
        """
        source = self.sources.get(id(tensor))
        if source is None:
            raise InvalidArchitectureError(
                f"a tensor of shape {tuple(tensor.shape)} acts as a weight but is no parameter of the network"
            )
        if source.uses:
            raise InvalidArchitectureError(f"parameter {source.name!r} is used twice; give each use its own tensor")
        rule_name = fallback or ("kaiming_normal" if tensor.dim() > 1 else "ones" if is_scale else "zeros")
        spec = parameter_spec(source, rule_name)
        source.uses.append(TensorUse(source, fallback or "node", level, torch_name=source.name, spec=spec))
        return source.uses[0]


def parameter_spec(source: Source, fallback: str) -> ParameterSpec:
    """A parameter of a traced network."""
    return ParameterSpec(source.name, source.shape, initializer=source.name, torch_name=source.name, fallback=fallback)


def _method(function: Any) -> Any:
    """A method of tensors that has the rule of one of torch's functions."""
    return lambda symbol, *args, **kwargs: RULES[function](symbol, *args, **kwargs)


@dataclass(frozen=True, slots=True, eq=False)
class Symbol:
    """A tensor that has a shape and an origin but no values.

    Attributes:
        recorder: What collects the nodes.
        shape: Shape of the tensor.
        flow: Recorded nodes whose outputs the tensor is made of.
        level: Length of the longest path of operations up to it.
        gate: Whether the value comes out of a sigmoid.
        attention: Recorded softmaxes that the value is the output of.
    """

    recorder: Recorder
    shape: tuple[int, ...]
    flow: Flow
    level: int
    gate: bool = False
    attention: Flow = NOTHING

    def reshaped(self, shape: tuple[int, ...]) -> Symbol:
        """The same values as a tensor of another shape."""
        return Symbol(self.recorder, shape, self.flow, self.level + 1, self.gate, self.attention)

    def result(self, flow: Flow, shape: tuple[int, ...] | None = None) -> Symbol:
        """What an operation on this tensor gives, coming from ``flow``; of the same shape where none is given."""
        return Symbol(self.recorder, self.shape if shape is None else shape, flow, self.level + 1)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Applies the rule of ``function``.

        Raises:
            UnsupportedArchitectureError: There is no rule for it.
        """
        implementation = RULES.get(function)
        if implementation is None:
            name = getattr(function, "__name__", repr(function))
            raise UnsupportedArchitectureError(
                f"the graph of {name!r} is not known; add a rule to ghn_architectures/tracing/operations.py"
            )
        return implementation(*args, **(kwargs or {}))

    # What ``forward`` calls on tensors: all of it has the rules of torch's functions.
    __add__ = __radd__ = _method(torch.add)
    __mul__ = __rmul__ = _method(torch.mul)
    __matmul__ = _method(torch.matmul)
    __getitem__ = _method(torch.Tensor.__getitem__)
    mean = _method(torch.mean)
    softmax = _method(torch.softmax)
    flatten = _method(torch.flatten)
    unflatten = _method(torch.unflatten)
    reshape = view = _method(torch.reshape)
    permute = _method(torch.permute)
    transpose = _method(torch.transpose)
    chunk = _method(torch.chunk)
    unbind = _method(torch.unbind)

    def dim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    ndim = property(dim)

    def size(self, axis: int | None = None) -> Any:
        """Shape, or the size of one axis."""
        return self.shape if axis is None else self.shape[axis]

    def contiguous(self, **_: Any) -> Symbol:
        """The same tensor."""
        return self
