"""Multi-layer perceptrons on flattened images.

Shapes: B examples, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ghn_architectures.interface import Interface
from ghn_architectures.layers import Linear, make_activation


@dataclass(frozen=True, slots=True)
class MlpConfiguration:
    """A multi-layer perceptron.

    Attributes:
        widths: Widths of the hidden layers.
        norm: ``layer`` or ``none``.
        activation: Nonlinearity.
        pool: Side of the average pooling before flattening; 1 for none.
    """

    family: ClassVar[str] = "mlp"

    widths: tuple[int, ...]
    norm: str = "none"
    activation: str = "relu"
    pool: int = 1

    def build(self, interface: Interface) -> nn.Module:
        """The network for ``interface``."""
        return Mlp(self, interface)


class Mlp(nn.Module):
    """Optional pooling, hidden layers with norm and activation, classifier."""

    def __init__(self, configuration: MlpConfiguration, interface: Interface) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(configuration.pool) if configuration.pool > 1 else nn.Identity()
        width = interface.in_channels * (interface.image_size // configuration.pool) ** 2
        self.hidden = nn.Sequential()
        for hidden_width in configuration.widths:
            self.hidden.append(Linear(width, hidden_width))
            if configuration.norm == "layer":
                self.hidden.append(nn.LayerNorm(hidden_width))
            self.hidden.append(make_activation(configuration.activation))
            width = hidden_width
        self.classifier = Linear(width, interface.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K)."""
        return self.classifier(self.hidden(self.pool(x).flatten(1)))  # type: ignore[no-any-return]
