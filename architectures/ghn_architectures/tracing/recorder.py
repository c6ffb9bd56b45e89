"""``Recorder``: collects nodes while a network is traced."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ghn_service.errors import InvalidArchitectureError
from ghn_service.graph.architecture import ParameterSpec

Sources = frozenset[int]
INPUT = 0


@dataclass(slots=True)
class Record:
    """A node in the making.

    Attributes:
        op_type: Name of a row of ``OP_TYPES``.
        level: Length of the longest path of operations before it.
        name: Name of the operation or parameter.
        predecessors: Indices of the records that feed it.
        weight: The parameter that it stands for.
        norm_bias: The bias beside a norm's weight.
        bias: Index of the bias that belongs to this weight; -1 without one.
        kernel_shape: Window of a pooling.
        gate: For a gate's product: the sources on the side of the gate.
        feature: For a gate's product: the sources of what is gated.
        activation: The nonlinearity that the output meets first, with its level.
        attributes: Arguments of ``LayerAttributes`` known so far; None for all but layers.
        removed: Whether it is contracted: its successors then follow its predecessors directly.
    """

    op_type: str
    level: int
    name: str = ""
    predecessors: set[int] = field(default_factory=set)
    weight: ParameterSpec | None = None
    norm_bias: ParameterSpec | None = None
    bias: int = -1
    kernel_shape: tuple[int, int] | None = None
    gate: Sources = frozenset()
    feature: Sources = frozenset()
    activation: tuple[int, str] | None = None
    attributes: dict[str, int | tuple[int, ...]] | None = None
    removed: bool = False


@dataclass(slots=True)
class Recorder:
    """Nodes recorded so far, and the cost of the operations met.

    Attributes:
        names: Parameter name by ``id`` of the parameter.
        records: The nodes in order of execution; record 0 is the input.
        multiply_adds: Multiplications with addition of all convolutions, linear layers and attention, per example.
        activation_elements: Elements of all tensors that operations wrote, per example.
        fallbacks: Initialisation rule by parameter name, for parameters without a node.
        used: Names of the parameters that have a node.
    """

    names: dict[int, str]
    records: list[Record] = field(default_factory=lambda: [Record("input", 0, "input")])
    multiply_adds: int = 0
    activation_elements: int = 0
    fallbacks: dict[str, str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    def add_operation(self, op_type: str, level: int, sources: Sources) -> int:
        """Records an operation without parameters that reads ``sources``; returns its index."""
        self.records.append(Record(op_type, level, op_type, set(sources)))
        return len(self.records) - 1

    def add_parameter(
        self, op_type: str, level: int, parameter: torch.Tensor, sources: Sources, *, fallback: str = "kaiming_normal"
    ) -> int:
        """Records a parameter that acts on ``sources``; returns its index.

        Raises:
            InvalidArchitectureError: The parameter is used twice, or does not belong to the network.
        """
        spec = self.spec(parameter, fallback)
        if spec.name in self.used:
            raise InvalidArchitectureError(f"parameter {spec.name!r} is used twice; give each use its own tensor")
        self.used.add(spec.name)
        self.records.append(Record(op_type, level, spec.name, set(sources), weight=spec))
        return len(self.records) - 1

    def spec(self, parameter: torch.Tensor, fallback: str) -> ParameterSpec:
        """What is known about a parameter of the network.

        Raises:
            InvalidArchitectureError: It is not a parameter of the network.
        """
        name = self.names.get(id(parameter))
        if name is None:
            raise InvalidArchitectureError(
                f"a tensor of shape {tuple(parameter.shape)} acts as a weight but is no parameter of the network"
            )
        return ParameterSpec(name, tuple(parameter.shape), initializer=name, torch_name=name, fallback=fallback)

    def note_activation(self, sources: Sources, level: int, name: str) -> None:
        """Remembers that the outputs of ``sources`` meet a nonlinearity at ``level``; the first one counts."""
        for index in sources:
            record = self.records[index]
            if record.activation is None or (level, name) < record.activation:
                record.activation = (level, name)
