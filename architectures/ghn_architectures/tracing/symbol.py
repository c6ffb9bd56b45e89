"""``Symbol``: stands for a tensor while a network's ``forward`` is run to find its graph.

A symbol knows the shape of the tensor and the graph nodes that the tensor comes from. It answers torch's functions
through ``__torch_function__`` with the rules of ``operations.py``; an operation without a rule is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ghn_service.errors import UnsupportedArchitectureError

if TYPE_CHECKING:
    from ghn_architectures.tracing.recorder import Recorder

Rule = Callable[..., Any]
RULES: dict[Any, Rule] = {}


def rule(*functions: Any) -> Callable[[Rule], Rule]:
    """Registers the decorated function as the meaning of torch's ``functions``."""

    def register(implementation: Rule) -> Rule:
        for function in functions:
            RULES[function] = implementation
        return implementation

    return register


class Symbol:
    """A tensor that has a shape and an origin but no values.

    Args:
        recorder: What collects the nodes.
        shape: Shape of the tensor.
        sources: Indices of the recorded nodes whose outputs the tensor is made of.
        level: Length of the longest path of operations up to it.
        gate: Whether the value comes out of a sigmoid.
        attention: Recorded softmaxes that the value is the output of.
    """

    __slots__ = ("attention", "gate", "level", "recorder", "shape", "sources")

    def __init__(
        self,
        recorder: Recorder,
        shape: tuple[int, ...],
        sources: frozenset[int],
        level: int,
        *,
        gate: bool = False,
        attention: frozenset[int] = frozenset(),
    ) -> None:
        self.recorder = recorder
        self.shape = shape
        self.sources = sources
        self.level = level
        self.gate = gate
        self.attention = attention

    def reshaped(self, shape: tuple[int, ...]) -> Symbol:
        """The same values as a tensor of another shape."""
        return Symbol(self.recorder, shape, self.sources, self.level + 1, gate=self.gate, attention=self.attention)

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

    # What ``forward`` calls on tensors: all of it goes through torch's functions, hence through the rules.
    def dim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def size(self, axis: int | None = None) -> Any:
        """Shape, or the size of one axis."""
        return self.shape if axis is None else self.shape[axis]

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __add__(self, other: Any) -> Any:
        return RULES[torch.add](self, other)

    __radd__ = __add__

    def __mul__(self, other: Any) -> Any:
        return RULES[torch.mul](self, other)

    __rmul__ = __mul__

    def __matmul__(self, other: Any) -> Any:
        return RULES[torch.matmul](self, other)

    def __getitem__(self, key: Any) -> Any:
        return RULES[torch.Tensor.__getitem__](self, key)

    def mean(self, dim: Any, keepdim: bool = False) -> Any:
        """As ``torch.mean``."""
        return RULES[torch.mean](self, dim, keepdim=keepdim)

    def softmax(self, dim: int) -> Any:
        """As ``torch.softmax``."""
        return RULES[torch.softmax](self, dim)

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Any:
        """As ``torch.flatten``."""
        return RULES[torch.flatten](self, start_dim, end_dim)

    def unflatten(self, dim: int, sizes: Sequence[int]) -> Any:
        """As ``torch.unflatten``."""
        return RULES[torch.unflatten](self, dim, sizes)

    def reshape(self, *shape: Any) -> Any:
        """As ``torch.reshape``."""
        return RULES[torch.reshape](self, shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)

    view = reshape

    def permute(self, *axes: Any) -> Any:
        """As ``torch.permute``."""
        return RULES[torch.permute](self, axes[0] if len(axes) == 1 and not isinstance(axes[0], int) else axes)

    def transpose(self, first: int, second: int) -> Any:
        """As ``torch.transpose``."""
        return RULES[torch.transpose](self, first, second)

    def chunk(self, chunks: int, dim: int = 0) -> Any:
        """As ``torch.chunk``."""
        return RULES[torch.chunk](self, chunks, dim)

    def unbind(self, dim: int = 0) -> Any:
        """As ``torch.unbind``."""
        return RULES[torch.unbind](self, dim)

    def contiguous(self, **_: Any) -> Symbol:
        """The same tensor."""
        return self
