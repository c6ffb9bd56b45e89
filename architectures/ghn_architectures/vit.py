"""Vision transformers of one resolution, and MLP-Mixers, which share their frame.

References: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words" (arXiv:2010.11929); Tolstikhin et al. 2021,
"MLP-Mixer" (arXiv:2105.01601).

Shapes: B examples, T tokens, C channels, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ghn_architectures.architecture import Configuration, Interface
from ghn_architectures.layers import Conv2d, EncoderBlock, Linear, TokenMlp, conv_norm, embedding_parameter
from ghn_service.errors import InvalidOptionError


class VisionTransformer(nn.Module):
    """Patches, position embedding, encoder blocks, norm, classifier."""

    def __init__(self, configuration: VisionTransformerConfiguration, interface: Interface) -> None:
        super().__init__()
        channels, patch = configuration.channels, configuration.patch
        num_tokens = (interface.image_size // patch) ** 2
        self.patches = _patches(configuration, interface.in_channels)
        self.class_token = None
        if configuration.class_token:
            self.class_token = embedding_parameter(1, 1, channels)
            num_tokens += 1
        self.pos_embedding = embedding_parameter(1, num_tokens, channels)
        self.blocks = nn.Sequential(
            *(
                EncoderBlock(channels, num_heads=configuration.num_heads, mlp_ratio=configuration.mlp_ratio)
                for _ in range(configuration.depth)
            )
        )
        self.norm = nn.LayerNorm(channels)
        self.classifier = Linear(channels, interface.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, K)."""
        tokens = self.patches(x).flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, T, C)
        if self.class_token is not None:
            tokens = torch.cat([self.class_token.expand(tokens.shape[0], -1, -1), tokens], 1)
        tokens = self.norm(self.blocks(tokens + self.pos_embedding))
        return self.classifier(tokens.mean(1) if self.class_token is None else tokens[:, 0])  # type: ignore[no-any-return]


def _patches(configuration: VisionTransformerConfiguration, in_channels: int) -> nn.Module:
    """(B, 3, H, W) -> (B, C, H / patch, W / patch)."""
    channels, patch = configuration.channels, configuration.patch
    if not configuration.convolutional_stem:
        return Conv2d(in_channels, channels, patch, stride=patch)
    layers: list[nn.Module] = []
    for halvings in reversed(range(patch.bit_length() - 1)):
        width = max(channels >> halvings, 8)
        layers.append(conv_norm(in_channels, width, 3, stride=2, activation="relu"))
        in_channels = width
    return nn.Sequential(*layers, Conv2d(in_channels, channels, 1))


@dataclass(frozen=True, slots=True)
class VisionTransformerConfiguration(Configuration):
    """A vision transformer.

    Attributes:
        num_heads: Attention heads.
        class_token: Whether a class token is read by the classifier; otherwise the mean of all tokens.
        convolutional_stem: Whether 3x3 convolutions of stride 2, each with norm and ReLU, make the patches, whose side
            is a power of two then (Xiao et al. 2021, arXiv:2106.14881); otherwise one convolution.
    """

    family: ClassVar[str] = "vit"
    network: ClassVar[type[nn.Module]] = VisionTransformer

    channels: int
    depth: int
    num_heads: int
    patch: int = 4
    mlp_ratio: int = 4
    class_token: bool = False
    convolutional_stem: bool = False

    def __post_init__(self) -> None:
        if self.convolutional_stem and self.patch & (self.patch - 1):
            raise InvalidOptionError(
                f"a convolutional stem halves the image; expected a power of two as patch, got {self.patch}"
            )


class MixerBlock(nn.Module):
    """A perceptron across tokens, then one across channels, each with its norm and shortcut."""

    def __init__(self, num_tokens: int, configuration: MixerConfiguration) -> None:
        super().__init__()
        channels = configuration.channels
        self.norm1 = nn.LayerNorm(channels)
        self.token_mlp = TokenMlp(num_tokens, configuration.token_hidden)
        self.norm2 = nn.LayerNorm(channels)
        self.channel_mlp = TokenMlp(channels, configuration.mlp_ratio * channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.token_mlp(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channel_mlp(self.norm2(x))  # type: ignore[no-any-return]


class Mixer(nn.Module):
    """Patches, mixer blocks, norm, mean over tokens, classifier."""

    def __init__(self, configuration: MixerConfiguration, interface: Interface) -> None:
        super().__init__()
        channels, patch = configuration.channels, configuration.patch
        num_tokens = (interface.image_size // patch) ** 2
        self.patches = Conv2d(interface.in_channels, channels, patch, stride=patch)
        self.blocks = nn.Sequential(*(MixerBlock(num_tokens, configuration) for _ in range(configuration.depth)))
        self.norm = nn.LayerNorm(channels)
        self.classifier = Linear(channels, interface.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, K)."""
        tokens = self.patches(x).flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, T, C)
        return self.classifier(self.norm(self.blocks(tokens)).mean(1))  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class MixerConfiguration(Configuration):
    """An MLP-Mixer.

    Attributes:
        token_hidden: Hidden size of the perceptrons across tokens.
    """

    family: ClassVar[str] = "mixer"
    network: ClassVar[type[nn.Module]] = Mixer

    channels: int
    depth: int
    patch: int = 4
    token_hidden: int = 64
    mlp_ratio: int = 4
