"""Networks without shortcuts: plain convolutional ones, of the VGG kind, and multi-layer perceptrons.

Reference: Simonyan and Zisserman 2015, "Very Deep Convolutional Networks" (arXiv:1409.1556).

Shapes: B examples, C channels, H x W positions, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ghn_architectures.architecture import Configuration, Interface
from ghn_architectures.layers import ClassifierHead, Linear, conv_norm, make_activation


class ConvNet(nn.Sequential):
    """Convolutions with norm and activation, stages divided by halved resolution, and a head."""

    def __init__(self, configuration: ConvNetConfiguration, interface: Interface) -> None:
        super().__init__()
        self.features = nn.Sequential()
        norm, activation = configuration.norm, configuration.activation
        channels, size = interface.in_channels, interface.image_size
        for stage, (width, depth) in enumerate(zip(configuration.widths, configuration.depths, strict=True)):
            for place in range(depth):
                is_first = stage == place == 0
                is_strided = configuration.downsampling == "stride" and place == depth - 1
                stride = configuration.stem_stride if is_first else 2 if is_strided and size > 1 else 1
                kernel = configuration.stem_kernel if is_first else configuration.kernel
                self.features.append(
                    conv_norm(channels, width, kernel, stride=stride, norm=norm, activation=activation)
                )
                channels, size = width, -(-size // stride)
            if configuration.downsampling != "stride" and size > 1:
                pool = nn.MaxPool2d if configuration.downsampling == "max" else nn.AvgPool2d
                self.features.append(pool(2, stride=2))
                size //= 2
        spatial = None if configuration.pooled else size
        self.head = ClassifierHead(channels, interface.num_classes, hidden=configuration.head, spatial=spatial)


@dataclass(frozen=True, slots=True)
class ConvNetConfiguration(Configuration):
    """A plain convolutional network.

    Attributes:
        depths: Convolutions in each stage.
        kernel: Kernel of all convolutions but the first.
        downsampling: What ends each stage: ``max`` or ``avg`` pooling, or ``stride`` in its last convolution.
    """

    family: ClassVar[str] = "convnet"
    network: ClassVar[type[nn.Module]] = ConvNet

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    kernel: int = 3
    stem_kernel: int = 3
    stem_stride: int = 1
    downsampling: str = "max"
    pooled: bool = True
    head: tuple[int, ...] = ()
    norm: str = "batch"
    activation: str = "relu"


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


@dataclass(frozen=True, slots=True)
class MlpConfiguration(Configuration):
    """A multi-layer perceptron.

    Attributes:
        widths: Widths of the hidden layers.
        norm: ``layer`` or ``none``.
        pool: Side of the average pooling before flattening; 1 for none.
    """

    family: ClassVar[str] = "mlp"
    network: ClassVar[type[nn.Module]] = Mlp

    widths: tuple[int, ...]
    norm: str = "none"
    activation: str = "relu"
    pool: int = 1
