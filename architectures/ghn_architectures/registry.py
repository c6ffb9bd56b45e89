"""``ARCHITECTURES``: the reference networks by name, in versions for small images.

Each is a plain torch module of a file of its family here; the original publications are named there. Sizes and depths
are the published ones; stems and first strides are those usual for 32 x 32 images. A new network is a line here.
"""

from __future__ import annotations

from torch import nn

from ghn_architectures.architecture import Architecture, Configuration, Interface
from ghn_architectures.convnet import ConvNetConfiguration, MlpConfiguration
from ghn_architectures.convnext import ConvNeXtConfiguration
from ghn_architectures.densenet import DenseNetConfiguration
from ghn_architectures.mobilenet import MobileNetConfiguration
from ghn_architectures.resnet import ResNetConfiguration
from ghn_architectures.swin import SwinConfiguration
from ghn_architectures.vit import MixerConfiguration, VisionTransformerConfiguration
from ghn_service.errors import InvalidOptionError

_CIFAR_WIDTHS = (16, 32, 64)
_VGG_WIDTHS = (64, 128, 256, 512, 512)

ARCHITECTURES: dict[str, Configuration] = {
    "resnet20": ResNetConfiguration(_CIFAR_WIDTHS, (3, 3, 3)),
    "resnet32": ResNetConfiguration(_CIFAR_WIDTHS, (5, 5, 5)),
    "resnet56": ResNetConfiguration(_CIFAR_WIDTHS, (9, 9, 9)),
    "resnet110": ResNetConfiguration(_CIFAR_WIDTHS, (18, 18, 18)),
    "resnet18": ResNetConfiguration((64, 128, 256, 512), (2, 2, 2, 2)),
    "resnet50": ResNetConfiguration((256, 512, 1024, 2048), (3, 4, 6, 3), block="bottleneck"),
    "wide_resnet16_4": ResNetConfiguration((64, 128, 256), (2, 2, 2), block="preactivation", stem_width=16),
    "wide_resnet28_10": ResNetConfiguration((160, 320, 640), (4, 4, 4), block="preactivation", stem_width=16),
    "vgg11_bn": ConvNetConfiguration(_VGG_WIDTHS, (1, 1, 2, 2, 2)),
    "vgg16_bn": ConvNetConfiguration(_VGG_WIDTHS, (2, 2, 3, 3, 3)),
    "densenet40": DenseNetConfiguration(12, (6, 6, 6)),
    "densenet100": DenseNetConfiguration(12, (16, 16, 16)),
    "mobilenet_v2": MobileNetConfiguration(
        widths=(16, 24, 32, 64, 96, 160, 320),
        depths=(1, 2, 3, 4, 3, 3, 1),
        strides=(1, 1, 2, 2, 1, 2, 1),
        expansions=(1, 6, 6, 6, 6, 6, 6),
        kernels=(3,) * 7,
        head_width=1280,
        activation="relu6",
    ),
    "efficientnet_b0": MobileNetConfiguration(
        widths=(16, 24, 40, 80, 112, 192, 320),
        depths=(1, 2, 2, 3, 3, 4, 1),
        strides=(1, 1, 2, 2, 1, 2, 1),
        expansions=(1, 6, 6, 6, 6, 6, 6),
        kernels=(3, 3, 5, 3, 5, 5, 3),
        squeeze=24,
        head_width=1280,
        activation="silu",
    ),
    "se_mobilenet_mini": MobileNetConfiguration(
        widths=(16, 24, 40, 80),
        depths=(1, 2, 2, 2),
        strides=(1, 2, 2, 2),
        expansions=(1, 4, 4, 4),
        kernels=(3, 3, 5, 3),
        stem_width=16,
        squeeze=4,
        head_width=256,
        activation="hardswish",
    ),
    "convnext_atto": ConvNeXtConfiguration((40, 80, 160, 320), (2, 2, 6, 2), layer_scale=1e-6),
    "convnext_tiny": ConvNeXtConfiguration((96, 192, 384, 768), (3, 3, 9, 3), layer_scale=1e-6),
    "vit_tiny": VisionTransformerConfiguration(192, 12, 3, class_token=True),
    "vit_mini": VisionTransformerConfiguration(96, 6, 3),
    "swin_tiny": SwinConfiguration(96, (2, 2, 6, 2), head_channels=32),
    "swin_mini": SwinConfiguration(32, (2, 2, 2)),
    "mixer_small": MixerConfiguration(128, 8),
    "mlp": MlpConfiguration((512, 256, 128)),
    "resnet20_normfree": ResNetConfiguration(_CIFAR_WIDTHS, (3, 3, 3), norm="none"),
    "vgg11": ConvNetConfiguration(_VGG_WIDTHS, (1, 1, 2, 2, 2), norm="none"),
}

SOURCES: dict[str, Configuration] = {
    "small_resnet": ResNetConfiguration(_CIFAR_WIDTHS, (2, 3, 3)),
    "small_resnet18": ResNetConfiguration((32, 64, 128, 256), (1, 1, 1, 1)),
    "small_vgg11_bn": ConvNetConfiguration((32, 64, 128, 192, 192), (1, 1, 2, 2, 2)),
    "small_wide_resnet": ResNetConfiguration((32, 64, 128), (1, 1, 1), block="preactivation", stem_width=16),
    "small_resnet50": ResNetConfiguration((32, 64, 128, 256), (1, 1, 2, 1), block="bottleneck", expansion=2),
    "small_mobilenet_v2": MobileNetConfiguration(
        widths=(8, 16, 24, 48, 64, 96, 128),
        depths=(1, 1, 2, 2, 1, 1, 1),
        strides=(1, 1, 2, 2, 1, 2, 1),
        expansions=(1, 3, 4, 4, 4, 4, 4),
        kernels=(3,) * 7,
        stem_width=16,
        head_width=256,
        activation="relu6",
    ),
    "small_vit": VisionTransformerConfiguration(96, 5, 3, mlp_ratio=2, convolutional_stem=True),
}
"""Small networks that larger ones contain, block for block: what a library of trained sources is made of."""


def reference_architecture(name: str, interface: Interface | None = None) -> Architecture:
    """The reference network ``name`` as a value.

    Args:
        name: Key of ``ARCHITECTURES``.
        interface: Sizes of input and output; 10 classes, three channels and 32 x 32 by default.

    Raises:
        InvalidOptionError: There is no such network.
    """
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise InvalidOptionError(f"no reference network is called {name!r}; known are {known}", field="name")
    configuration = ARCHITECTURES[name]
    return Architecture(configuration.family, configuration, interface or Interface(), name)


def build_network(name: str, *, num_classes: int = 10, in_channels: int = 3, image_size: int = 32) -> nn.Module:
    """The reference network ``name`` as a torch module with He-initialised weights.

    Args:
        name: Key of ``ARCHITECTURES``.
        num_classes: Number of classes K of the output (B, K).
        in_channels: Channels of the input (B, in_channels, image_size, image_size).
        image_size: Side of the input.

    Raises:
        InvalidOptionError: There is no such network, or a size is out of range.
    """
    return reference_architecture(name, Interface(num_classes, in_channels, image_size)).build()
