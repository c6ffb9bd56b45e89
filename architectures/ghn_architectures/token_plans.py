"""How networks of tokens and perceptrons are drawn: everything but the width, as in ``plans.py``."""

from __future__ import annotations

from ghn_architectures.attention import heads_for
from ghn_architectures.convnext import ConvNeXtConfiguration
from ghn_architectures.draw import Draw
from ghn_architectures.interface import Configuration
from ghn_architectures.layers import round_channels
from ghn_architectures.mlp import MlpConfiguration
from ghn_architectures.plans import Plan
from ghn_architectures.swin import SwinConfiguration
from ghn_architectures.vit import MixerConfiguration, VisionTransformerConfiguration


def plan_convnext(draw: Draw, scale: int) -> Plan:
    """ConvNeXts; a quarter of them with layer scale."""
    stages = draw.choice((2, 3, 3, 4))
    depths = tuple(draw.integer(1, scale) for _ in range(stages))
    growth = draw.choice((1.5, 2.0, 2.0))
    patch = draw.choice((1, 2, 2, 2, 4)) if scale > 1 else draw.choice((2, 2, 4))
    kernel = draw.choice((3, 5, 7, 7, 7))
    mlp_ratio = draw.choice((2, 3, 4, 4))
    layer_scale = draw.choice((1e-6, 0.1)) if draw.chance(0.25) else 0.0
    return lambda base: ConvNeXtConfiguration(
        widths=tuple(round_channels(base * growth**stage) for stage in range(stages)),
        depths=depths,
        patch=patch,
        kernel=kernel,
        mlp_ratio=mlp_ratio,
        layer_scale=layer_scale,
    )


def plan_vit(draw: Draw, scale: int) -> Plan:
    """Vision transformers of two channels per unit of base width."""
    depth = draw.integer(2, 2 + 2 * scale)
    patch = draw.choice((4, 4, 4, 8)) if scale == 1 else draw.choice((2, 4, 4, 4))
    head_channels = draw.choice((8, 16, 16, 32))
    mlp_ratio = draw.choice((2, 3, 4))
    class_token = draw.chance(0.4)
    return lambda base: VisionTransformerConfiguration(
        2 * base, depth, heads_for(2 * base, head_channels), patch, mlp_ratio, class_token
    )


def plan_mixer(draw: Draw, scale: int) -> Plan:
    """MLP-Mixers of two channels per unit of base width."""
    depth = draw.integer(2, 2 + 2 * scale)
    patch = draw.choice((2, 4, 4, 4)) if scale > 1 else 4
    token_hidden = draw.choice((32, 64, 64, 128))
    mlp_ratio = draw.choice((2, 3, 4))
    return lambda base: MixerConfiguration(2 * base, depth, patch, token_hidden, mlp_ratio)


def plan_swin(draw: Draw, scale: int) -> Plan:
    """Hierarchical transformers."""
    depths = tuple(draw.choice((1, 2) if scale < 3 else (2, 2, 4)) for _ in range(draw.integer(2, 3)))
    patch = draw.choice((2, 4))
    head_channels = draw.choice((8, 16, 32))
    mlp_ratio = draw.choice((2, 4))
    return lambda base: SwinConfiguration(base, depths, head_channels, patch, 4, mlp_ratio)


def plan_mlp(draw: Draw, scale: int) -> Plan:
    """Multi-layer perceptrons of eight units per unit of base width."""
    depth = draw.integer(1, 2 + scale)
    shape = draw.choice(("equal", "falling"))
    norm = draw.choice(("none", "layer"))
    activation = draw.choice(("relu", "relu", "gelu", "silu"))
    pool = draw.choice((1, 1, 2))

    def plan(base: int) -> Configuration:
        widths = (8 * base // (1 if shape == "equal" else 2**place) for place in range(depth))
        return MlpConfiguration(tuple(round_channels(width, least=32) for width in widths), norm, activation, pool)

    return plan
