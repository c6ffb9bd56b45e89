"""The families of random networks: how each is drawn, and its share in each split.

Each ``plan`` function takes a stream of random choices and a scale (1 for tiny networks, 2 for small, 3 for base: it
bounds the depth) and returns a *plan*: a function from a base width (channels of the first stage, a multiple of 8) to a
configuration. Everything but the width is drawn; ``generator.py`` looks for the width whose cost fits.

Reference: Knyazev et al. 2021 (arXiv:2110.13100), appendix A, for the cells.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ghn_architectures.architecture import Configuration
from ghn_architectures.cell_network import CellNetworkConfiguration
from ghn_architectures.cells import OPERATIONS, Genotype, draw_genotype
from ghn_architectures.convnet import ConvNetConfiguration, MlpConfiguration
from ghn_architectures.convnext import ConvNeXtConfiguration
from ghn_architectures.densenet import DenseNetConfiguration
from ghn_architectures.draw import Draw
from ghn_architectures.layers import heads_for, round_channels
from ghn_architectures.mobilenet import MobileNetConfiguration
from ghn_architectures.resnet import ResNetConfiguration
from ghn_architectures.swin import SwinConfiguration
from ghn_architectures.vit import MixerConfiguration, VisionTransformerConfiguration

Plan = Callable[[int], Configuration]


def _with(template: Configuration, **changes: object) -> Configuration:
    return dataclasses.replace(template, **changes)  # type: ignore[type-var]


def _draw_activation(draw: Draw) -> str:
    """Mostly ReLU."""
    return draw.weighted({"relu": 0.8, "silu": 0.06, "gelu": 0.06, "leaky_relu": 0.04, "hardswish": 0.04})


def _draw_norm(draw: Draw, *, without: float = 0.1) -> str:
    """Batch norm, or none with probability ``without``."""
    return "none" if draw.chance(without) else "batch"


def _draw_stem_stride(draw: Draw, scale: int) -> int:
    """Mostly 1, as usual for small images; 2 more often in smaller networks."""
    return 2 if draw.chance(0.5 - 0.13 * scale) else 1


def _widths(base: int, growths: tuple[float, ...]) -> tuple[int, ...]:
    widths = [float(base)]
    for growth in growths:
        widths.append(widths[-1] * growth)
    return tuple(round_channels(width) for width in widths)


def _plan_resnet(draw: Draw, scale: int) -> Plan:
    """Basic and pre-activation residual networks, with the classical ones (16, 32, 64 channels) in their middle."""
    stages = draw.choice((2, 3, 3, 3, 3, 4))
    equal = draw.integer(1, 1 + scale)
    is_even = draw.chance(0.6)
    depths = tuple(equal if is_even else draw.integer(1, 1 + scale) for _ in range(stages))
    growths = tuple(2.0 if draw.chance(0.75) else draw.choice((1.0, 1.5, 3.0)) for _ in range(stages - 1))
    norm = _draw_norm(draw, without=0.06)
    template = ResNetConfiguration(
        widths=(8,),
        depths=depths,
        block="preactivation" if draw.chance(0.2) else "basic",
        stem_kernel=draw.choice((3, 3, 3, 5, 7)),
        stem_stride=_draw_stem_stride(draw, scale),
        stem_pool=draw.chance(0.1),
        kernel=5 if draw.chance(0.06) else 3,
        shortcut=draw.weighted({"conv": 0.65, "pool": 0.2, "pad": 0.15}),
        norm=norm,
        activation=_draw_activation(draw),
        squeeze=draw.choice((4, 8)) if draw.chance(0.1) else 0,
        head=(64,) if draw.chance(0.08) else (),
    )
    return lambda base: _with(template, widths=_widths(base, growths))


def _plan_deep_resnet(draw: Draw, scale: int) -> Plan:
    """Residual networks of 5 to 9 blocks per stage, some of 10 to 18, some uneven; half of them strided at once."""
    stages = draw.choice((2, 3, 3, 3, 4))
    kind = draw.weighted({"many": 0.6, "uneven": 0.2, "most": 0.2})
    equal = draw.integer(10, 18) if kind == "most" else draw.integer(5, 9)
    depths = tuple(draw.integer(2, 9) if kind == "uneven" else equal for _ in range(stages))
    shallow, stem_stride = _plan_resnet(draw, scale), 2 if draw.chance(0.5) else 1

    def plan(base: int) -> Configuration:
        drawn = shallow(base)
        widths = _widths(base, tuple(2.0 for _ in range(stages - 1)))
        return _with(drawn, widths=widths, depths=depths, stem_stride=stem_stride)

    return plan


def _plan_bottleneck(draw: Draw, scale: int) -> Plan:
    """Residual networks of bottleneck blocks, some with grouped convolutions."""
    stages = draw.choice((2, 3, 3, 4))
    depths = tuple(draw.integer(1, 1 + scale) for _ in range(stages))
    expansion = draw.choice((4, 4, 4, 2))
    template = ResNetConfiguration(
        widths=(8,),
        depths=depths,
        block="bottleneck",
        stem_kernel=draw.choice((3, 3, 5, 7)),
        stem_stride=_draw_stem_stride(draw, scale),
        stem_pool=draw.chance(0.15),
        groups=draw.choice((2, 4, 8)) if draw.chance(0.25) else 1,
        expansion=expansion,
        shortcut=draw.weighted({"conv": 0.8, "pool": 0.2}),
        norm=_draw_norm(draw, without=0.04),
        activation=_draw_activation(draw),
        squeeze=draw.choice((4, 8)) if draw.chance(0.15) else 0,
    )
    growths = tuple(2.0 if draw.chance(0.85) else 1.5 for _ in range(stages - 1))
    return lambda base: _with(template, widths=_widths(base * expansion, growths))


def _plan_convnet(draw: Draw, scale: int) -> Plan:
    """Plain convolutional networks."""
    stages = draw.integer(2, 5)
    norm = _draw_norm(draw, without=0.2)
    most = 2 if norm == "none" or scale == 1 else 3
    depths = tuple(draw.integer(1, most) for _ in range(stages))
    growths = tuple(draw.choice((1.0, 1.5, 2.0, 2.0, 2.0)) for _ in range(stages - 1))
    template = ConvNetConfiguration(
        widths=(8,),
        depths=depths,
        kernel=draw.choice((3, 3, 3, 3, 3, 5)),
        stem_kernel=draw.choice((3, 3, 3, 5, 7)),
        stem_stride=_draw_stem_stride(draw, scale),
        downsampling=draw.weighted({"max": 0.5, "stride": 0.35, "avg": 0.15}),
        pooled=draw.chance(0.8),
        head=draw.choice(((64,), (128,), (128, 64))) if draw.chance(0.15) else (),
        norm=norm,
        activation=_draw_activation(draw),
    )
    return lambda base: _with(template, widths=_widths(base, growths))


def _plan_densenet(draw: Draw, scale: int) -> Plan:
    """Densely connected networks."""
    blocks = draw.choice((2, 3, 3))
    depths = tuple(draw.integer(2, 2 + 2 * scale) for _ in range(blocks))
    template = DenseNetConfiguration(
        growth=8,
        depths=depths,
        bottleneck=draw.choice((0, 2, 4)),
        compression=draw.choice((0.5, 1.0)),
        stem_stride=_draw_stem_stride(draw, scale),
        norm=_draw_norm(draw, without=0.03),
        activation=_draw_activation(draw),
    )
    factor = draw.choice((1, 2, 3))
    return lambda base: _with(template, growth=base, stem_width=base * factor)


def _plan_mobilenet(draw: Draw, scale: int) -> Plan:
    """Inverted residuals, about half of them with squeeze-and-excitation gates."""
    stages = draw.integer(2, 2 + scale)
    growths = tuple(draw.choice((1.0, 1.5, 1.5, 2.0)) for _ in range(stages))
    strides = (1, *(2 if place < 4 and draw.chance(0.7) else 1 for place in range(stages - 1)))
    is_gated = draw.chance(0.5)
    expansion = draw.choice((2, 3, 4, 4, 6))
    template = MobileNetConfiguration(
        widths=(8,),
        depths=tuple(draw.integer(1, scale) for _ in range(stages)),
        strides=strides,
        expansions=(draw.choice((1, expansion)), *(expansion for _ in range(stages - 1))),
        kernels=tuple(draw.choice((3, 3, 3, 5)) for _ in range(stages)),
        stem_stride=2 if draw.chance(0.7 - 0.17 * scale) else 1,
        squeeze=draw.choice((4, 4, 8)) if is_gated else 0,
        norm=_draw_norm(draw, without=0.02),
        activation=draw.weighted({"relu": 0.5, "silu": 0.25, "hardswish": 0.25}),
    )
    head_factor = draw.choice((0, 2, 4))

    def plan(base: int) -> Configuration:
        widths = _widths(base, growths)
        return _with(template, stem_width=widths[0], widths=widths[1:], head_width=head_factor * widths[-1])

    return plan


def _plan_cells(draw: Draw, scale: int, *, steps: tuple[int, int] = (1, 3), norm: str | None = None) -> Plan:
    """Networks of repeated cells of so many ``steps``, the kind of DeepNets-1M, without self-attention."""
    allowed = tuple(name for name in OPERATIONS if name != "msa")
    num_cells = draw.integer(3, 4 + 2 * scale)
    is_deep = num_cells > 7
    num_steps = draw.integer(steps[0], max(steps[0], steps[1] - is_deep))
    genotype = draw_genotype(draw, steps=num_steps, allowed=allowed)
    if norm is None:
        norm = _draw_norm(draw, without=0.5 if num_cells <= 4 and num_steps <= 2 else 0.0)
    stem = "strided" if draw.chance(0.5 - 0.1 * scale) else "simple"
    return _plan_of_cells(draw, genotype, num_cells, stem=stem, norm=norm)


def _plan_attention_cells(draw: Draw, scale: int) -> Plan:
    """Networks of cells with self-attention, at one resolution, on patches."""
    while True:
        genotype = draw_genotype(draw, steps=draw.integer(1, 2))
        if genotype.is_isotropic:
            return _plan_of_cells(draw, genotype, draw.integer(2, 2 + 2 * scale), stem="patch", norm="batch")


def _plan_of_cells(draw: Draw, genotype: Genotype, num_cells: int, *, stem: str, norm: str) -> Plan:
    is_patch = stem == "patch"
    multiplier = draw.choice((1, 2, 2))
    is_deep = num_cells > 7
    has_layers = draw.chance(0.15)
    template = CellNetworkConfiguration(
        genotype=genotype,
        num_cells=num_cells,
        channels=8,
        multiplier=multiplier,
        stem=stem,
        stem_kernel=draw.choice((2, 4, 4)) if is_patch else draw.choice((3, 3, 5, 7)),
        stem_pool=draw.chance(0.3),
        preprocess=draw.chance(0.2) if is_patch else True,
        positions=is_patch,
        pooled=is_patch or is_deep or draw.chance(0.9),
        head=(draw.choice((64, 128)),) if has_layers else (),
        norm=norm,
    )
    return lambda base: _with(template, channels=base)


def _plan_convnext(draw: Draw, scale: int) -> Plan:
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


def _plan_vit(draw: Draw, scale: int) -> Plan:
    """Vision transformers of two channels per unit of base width."""
    depth = draw.integer(2, 2 + 2 * scale)
    patch = draw.choice((4, 4, 4, 8)) if scale == 1 else draw.choice((2, 4, 4, 4))
    head_channels = draw.choice((8, 16, 16, 32))
    mlp_ratio = draw.choice((2, 3, 4))
    class_token = draw.chance(0.4)
    return lambda base: VisionTransformerConfiguration(
        2 * base, depth, heads_for(2 * base, head_channels), patch, mlp_ratio, class_token
    )


def _plan_mixer(draw: Draw, scale: int) -> Plan:
    """MLP-Mixers of two channels per unit of base width."""
    depth = draw.integer(2, 2 + 2 * scale)
    patch = draw.choice((2, 4, 4, 4)) if scale > 1 else 4
    token_hidden = draw.choice((32, 64, 64, 128))
    mlp_ratio = draw.choice((2, 3, 4))
    return lambda base: MixerConfiguration(2 * base, depth, patch, token_hidden, mlp_ratio)


def _plan_swin(draw: Draw, scale: int) -> Plan:
    """Hierarchical transformers."""
    depths = tuple(draw.choice((1, 2) if scale < 3 else (2, 2, 4)) for _ in range(draw.integer(2, 3)))
    patch = draw.choice((2, 4))
    head_channels = draw.choice((8, 16, 32))
    mlp_ratio = draw.choice((2, 4))
    return lambda base: SwinConfiguration(base, depths, head_channels, patch, 4, mlp_ratio)


def _plan_mlp(draw: Draw, scale: int) -> Plan:
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


@dataclass(frozen=True, slots=True)
class Family:
    """A way to draw networks: everything but the width, from random choices and a scale; and its relative share."""

    plan: Callable[[Draw, int], Plan]
    share: float


FAMILIES: dict[str, Family] = {
    "cells": Family(_plan_cells, 0.25),
    "resnet": Family(_plan_resnet, 0.24),
    "convnet": Family(_plan_convnet, 0.13),
    "mobilenet": Family(_plan_mobilenet, 0.10),
    "bottleneck": Family(_plan_bottleneck, 0.06),
    "convnext": Family(_plan_convnext, 0.06),
    "densenet": Family(_plan_densenet, 0.05),
    "vit": Family(_plan_vit, 0.035),
    "mlp": Family(_plan_mlp, 0.025),
    "attention_cells": Family(_plan_attention_cells, 0.02),
    "mixer": Family(_plan_mixer, 0.02),
    "swin": Family(_plan_swin, 0.01),
}


def _without_norm(family: Family) -> Family:
    """The same networks without normalisation."""

    def plan(draw: Draw, scale: int) -> Plan:
        drawn = family.plan(draw, scale)
        return lambda base: _with(drawn(base), norm="none")

    return Family(plan, family.share)


NORM_FREE_FAMILIES: dict[str, Family] = {
    name: _without_norm(FAMILIES[name]) for name in ("cells", "resnet", "convnet", "mobilenet", "bottleneck")
}
DEEP_FAMILIES: dict[str, Family] = {
    name: FAMILIES[name] for name in ("cells", "resnet", "mobilenet", "bottleneck", "densenet", "convnext", "vit")
}
DENSE_FAMILIES: dict[str, Family] = {"cells": Family(partial(_plan_cells, steps=(4, 8), norm="batch"), 1.0)}
_DEEPER_SHARES = {"bottleneck": 0.14, "mobilenet": 0.12, "densenet": 0.08, "convnext": 0.06, "vit": 0.05}
DEEPER_FAMILIES: dict[str, Family] = {
    "resnet": Family(_plan_deep_resnet, 0.55),
    **{name: Family(FAMILIES[name].plan, share) for name, share in _DEEPER_SHARES.items()},
}
