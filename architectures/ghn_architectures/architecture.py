"""``Architecture``: one network as a value, from which the module and the graph are made; ``Interface``: its task."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from torch import nn

from ghn_architectures.layers import skip_initialization
from ghn_architectures.tracing import Trace, trace
from ghn_service.errors import InvalidOptionError
from ghn_service.graph.architecture import ArchitectureGraph


@dataclass(frozen=True, slots=True)
class Interface:
    """Sizes of a network's input and output.

    Attributes:
        num_classes: Number of classes K of the output (B, K).
        in_channels: Channels of the input (B, in_channels, image_size, image_size).
        image_size: Side of the input image.

    Raises:
        InvalidOptionError: A size is out of range.
    """

    num_classes: int = 10
    in_channels: int = 3
    image_size: int = 32

    def __post_init__(self) -> None:
        for name, value, least in (
            ("num_classes", self.num_classes, 1),
            ("in_channels", self.in_channels, 1),
            ("image_size", self.image_size, 16),
        ):
            if value < least:
                raise InvalidOptionError(f"{name} must be at least {least}, got {value}", field=name)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of one example."""
        return (self.in_channels, self.image_size, self.image_size)


class Configuration:
    """Everything that decides an architecture of one family, as a frozen and hashable value.

    Fields of one name mean the same in every family: ``widths`` are the output channels and ``depths`` the blocks of
    each stage, ``depth`` all blocks, ``channels`` those of each token, ``patch`` is the side of a patch, ``mlp_ratio``
    a perceptron's hidden channels in units of its input's; ``stem_width``, ``stem_kernel`` and ``stem_stride`` are
    channels, kernel and stride of the first convolution, ``norm`` is ``batch`` or ``none``, ``activation`` a name in
    ``layers.ACTIVATIONS``; with ``pooled`` the head averages over positions, otherwise it flattens, and ``head`` are
    the widths of hidden linear layers before the classifier.
    """

    __slots__ = ()
    family: ClassVar[str]
    network: ClassVar[type[nn.Module]]

    def build(self, interface: Interface) -> nn.Module:
        """The network for ``interface``."""
        return self.network(self, interface)


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
