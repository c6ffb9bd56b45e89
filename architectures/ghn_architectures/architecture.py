"""``Architecture``: one network as a value, from which the module and the graph are made."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from torch import nn

from ghn_architectures.interface import Configuration, Interface
from ghn_architectures.layers import skip_initialization
from ghn_architectures.tracing import Trace, trace
from ghn_service.graph.architecture import ArchitectureGraph

CANONICAL = Interface()


@dataclass(frozen=True, slots=True)
class Architecture:
    """A network's design, small and hashable; nothing is built before it is asked for.

    Attributes:
        family: Name of the family that it was drawn from.
        configuration: The design.
        interface: Sizes of input and output.
        name: Split and index, or the name in the registry.
    """

    family: str
    configuration: Configuration
    interface: Interface
    name: str = ""

    def build(self, *, initialize: bool = True) -> nn.Module:
        """The network as a torch module.

        Args:
            initialize: Whether weights are initialised (from torch's global generator); otherwise they are whatever
                memory held, which is enough where predicted weights replace them. Buffers are always initialised.
        """
        if initialize:
            return self.configuration.build(self.interface)
        with skip_initialization():
            return self.configuration.build(self.interface)

    def graph(self) -> ArchitectureGraph:
        """The architecture's graph; parameter names are keys of the module's ``state_dict``."""
        return self.trace().graph

    def trace(self) -> Trace:
        """The graph and the cost for this interface; the last ones asked for are kept."""
        return _trace(self.configuration, self.interface)

    @property
    def multiply_adds(self) -> int:
        """Multiplications with addition of a forward pass of one example."""
        return self.trace().multiply_adds

    @property
    def activation_elements(self) -> int:
        """Elements written in a forward pass of one example."""
        return self.trace().activation_elements

    @property
    def num_parameters(self) -> int:
        """Number of trainable scalars."""
        return self.trace().graph.num_parameters

    @property
    def num_nodes(self) -> int:
        """Nodes of the graph."""
        return self.trace().graph.num_nodes


@lru_cache(maxsize=64)
def _trace(configuration: Configuration, interface: Interface) -> Trace:
    with skip_initialization():
        module = configuration.build(interface)
    return trace(module, interface.input_shape)
