"""Decoders: what turns node embeddings into blocks of weights.

``TiledDecoder`` (GHN-2 and GHN-3) gives blocks of at most ``max_shape`` channels, which are repeated to fit;
``LowRankDecoder`` (LoGAH) gives two factors that cover a weight whole; both share ``VectorDecoder``. Tensors that agree
in role and shape are decoded together. A new decoder is a class with the methods of these two and a line in
``DECODERS``.

Legend: T nodes, P tensors of a group, C hidden channels, (h, w) kernel, (o, i) channels of a block, g side of a
position grid, (Mo, Mi, Mh, Mw) ``max_shape``, K classes, r rank.

References: Knyazev et al. 2021 (arXiv:2110.13100), section 4.3 and appendix A; Knyazev et al. 2023 (arXiv:2303.04143),
section 3.3; Zhou et al. 2024, LoGAH (arXiv:2405.16287), section 4. Scale by fan-in: He et al. 2015 (arXiv:1502.01852).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ghn_service.hypernetwork.config import GHNConfig
from ghn_service.hypernetwork.features import Role, Target
from ghn_service.hypernetwork.sliced_linear import layer_slices, sliced_linear

CLASS_TOKEN_STD = 0.02
VECTOR_ROLES = (Role.VECTOR, Role.BIAS, Role.CLASS_BIAS)
# The reference tells position grids from kernels by these two sizes; its trained checkpoints rely on it.
POSITION_GRID_MIN_SIDE = 11
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "leaky_relu": partial(functional.leaky_relu, negative_slope=0.1),
}
LAST_LAYER_SHRINKAGE = 5.0
FIRST_PRODUCT_STD = 0.1
# Linear layers start uniform with variance 1 / (3 fan-in); He's variance before a ReLU is 2 / fan-in.
DEFAULT_TO_HE = 1 / math.sqrt(6)

Item = TypeVar("Item")
Key = TypeVar("Key")
# Tensors that agree in this are decoded together.
role_and_shape = attrgetter("role", "shape")


DecodedGroup = tuple[list[Target], Tensor]
"""P tensors of one shape, and their scaled values (P, *block): with their axes, shorter where these repeat a block."""


class VectorDecoder(nn.Module):
    """Weights of normalisations (first row) and biases (second row), and the classifier's bias."""

    def __init__(self, config: GHNConfig) -> None:
        super().__init__()
        channels, length = config.hidden_channels, max(config.max_shape[:2])
        self.weight_norm = config.weight_norm
        self.activation = ACTIVATIONS[config.decoder_activation]
        self.hidden = nn.Linear(channels, 2 * channels)
        self.output = nn.Linear(2 * channels, 2 * length)
        self.class_bias = nn.Linear(length, config.num_classes)

    def forward(self, embeddings: Tensor, targets: Sequence[Target]) -> Iterator[DecodedGroup]:
        """Decodes the vectors among the targets."""
        wanted = [target for target in targets if target.role in VECTOR_ROLES]
        if not wanted:
            return
        rows = sorted({target.node for target in wanted})
        place = dict(zip(rows, range(len(rows)), strict=True))
        hidden = self.activation(self.hidden(embeddings[rows].to(self.hidden.weight.dtype)))
        decoded = torch.unflatten(self.output(hidden), 1, (2, -1))  # (nodes, 2, length)
        values = {Role.VECTOR: decoded[:, 0], Role.BIAS: decoded[:, 1]}
        if Role.CLASS_BIAS in {target.role for target in wanted}:
            values[Role.CLASS_BIAS] = self.class_bias(self.activation(decoded[:, 1]))
        if self.weight_norm:  # weights between 0 and 2 around 1, biases between -1 and 1
            for role, value in values.items():
                values[role] = 2 * torch.sigmoid(value / 2) if role is Role.VECTOR else torch.tanh(value / 5)
        for (role, shape), members in grouped(wanted, role_and_shape).items():
            length = min(math.prod(shape), values[role].shape[1])
            block = [length if size > 1 else 1 for size in shape] if math.prod(shape) > 1 else shape
            places = [place[target.node] for target in members]
            yield members, values[role][places, :length].reshape(len(places), *block)


class TiledDecoder(nn.Module):
    """The decoder of GHN-2 and GHN-3: a grid of kernel positions, and a block of channels at each.

    An embedding is spread over a grid of ``max_shape[2:]`` positions; every position is decoded on its own to
    ``max_shape[:2]`` channels. Smaller kernels take a part of the grid, larger ones are interpolated from it.
    """

    def __init__(self, config: GHNConfig) -> None:
        super().__init__()
        channels = config.hidden_channels
        max_out, max_in, max_height, max_width = config.max_shape
        self.max_shape = config.max_shape
        self.weight_norm = config.weight_norm
        self.activation = ACTIVATIONS[config.decoder_activation]
        self.is_centered = config.kernel_crop == "center"
        self.grid = nn.Linear(channels, 4 * channels * max_height * max_width)
        self.hidden = nn.Linear(4 * channels, 8 * channels)
        self.output = nn.Linear(8 * channels, max_out * max_in)
        self.class_output = nn.Linear(max_out, config.num_classes)
        self.vectors = VectorDecoder(config)

    def scale_first_predictions(self) -> None:
        """Brings the first predictions of an untrained decoder close to their mean."""
        for layer in (self.output, self.class_output, self.vectors.output):
            _shrink_layer(layer)

    def forward(
        self, embeddings: Tensor, targets: Sequence[Target], *, seed: int = 0, max_elements: int | None = None
    ) -> Iterator[DecodedGroup]:
        """Decodes every target once.

        Args:
            embeddings: Node embeddings, (T, C).
            targets: What to decode; ``node`` is the row of the embedding.
            seed: Seeds the rows that are drawn (class tokens of position embeddings).
            max_elements: Largest number of values to hold for one group; None for no limit.
        """
        yield from self.vectors(embeddings, targets)
        embeddings = embeddings.to(self.grid.weight.dtype)
        matrices = [target for target in targets if target.role not in VECTOR_ROLES]
        by_kernel = grouped(matrices, attrgetter("kernel"))
        kernels, limits = sorted(by_kernel), self.max_shape[2:]
        crops = [(slice(None), *_kernel_slices(kernel, limits, is_centered=self.is_centered)) for kernel in kernels]
        grids = dict(zip(kernels, layer_slices(self.grid, (-1, *limits), crops), strict=True))  # (4C, h, w, C)
        sizes = sorted({self._block_sizes(target) for target in matrices})
        corners = [(slice(0, out_channels), slice(0, in_channels)) for out_channels, in_channels in sizes]
        outputs = dict(zip(sizes, layer_slices(self.output, self.max_shape[:2], corners), strict=True))  # (o, i, 8C)
        for kernel, same_kernel in by_kernel.items():
            grid = self.activation(sliced_linear(embeddings[[target.node for target in same_kernel]], *grids[kernel]))
            hidden = self.activation(self.hidden(grid.permute(0, 2, 3, 1)))  # (P, 4C, h, w) -> (P, h, w, 8C)
            by_size = grouped(enumerate(same_kernel), lambda item: self._block_sizes(item[1]))
            for (out_channels, in_channels), members in by_size.items():
                elements = hidden.shape[1] * hidden.shape[2] * out_channels * in_channels
                for part in parts(members, elements, max_elements):
                    features = hidden[[place for place, _ in part]]
                    blocks = sliced_linear(features, *outputs[out_channels, in_channels])  # (P, h, w, o, i)
                    blocks = resize(blocks.permute(0, 3, 4, 1, 2), kernel)
                    yield from self._finish(blocks, [target for _, target in part], seed)

    def _block_sizes(self, target: Target) -> tuple[int, int]:
        """(o, i) to decode: what the tensor needs, rounded up to a power of two so that more tensors share a batch."""
        (out_channels, in_channels), (max_out, max_in) = target.channels, self.max_shape[:2]
        if target.role is Role.CLASS_MATRIX:
            out_channels = max_out
        return min(max_out, 1 << (out_channels - 1).bit_length()), min(max_in, 1 << (in_channels - 1).bit_length())

    def _finish(self, blocks: Tensor, targets: list[Target], seed: int) -> Iterator[DecodedGroup]:
        """Cuts blocks to their tensors' sizes, gives them the tensors' axes, and scales them, shape by shape."""
        place = dict(zip(targets, range(len(targets)), strict=True))
        for (role, shape), members in grouped(targets, role_and_shape).items():
            some = blocks if len(members) == len(targets) else blocks[[place[target] for target in members]]
            out_channels, in_channels = members[0].channels
            some = some[:, :, :in_channels]
            if role is Role.CLASS_MATRIX:  # (P, Mo, i, 1, 1) -> (P, K, i, 1, 1)
                classes = self.class_output(self.activation(some[..., 0, 0]).transpose(1, 2))
                some = classes.transpose(1, 2)[..., None, None]
            values = _as_tensors(some[:, :out_channels], members, seed=seed)
            yield members, values * weight_scale(shape) if self.weight_norm else values


# (side: 0 out or 1 in, channels, first position, position after the last)
Corner = tuple[int, int, int, int]
Layer = tuple[Tensor, Tensor]


class LowRankDecoder(nn.Module):
    r"""Decodes each weight as a product of two factors that cover it whole, in the manner of LoGAH.

    .. math:: W[o, i, y, x] = r^{-1/2} \sum_k A[k, o, y] \, B[k, i, x]

    A multilayer perceptron gives 2r vectors of r features per node; one linear layer shared by all nodes spreads each
    over ``max_shape[0]`` channels times ``max_shape[2]`` positions (A) or ``max_shape[1]`` times ``max_shape[3]`` (B).
    Only layers wider than ``max_shape`` are repeated.
    """

    def __init__(self, config: GHNConfig) -> None:
        super().__init__()
        channels = config.hidden_channels
        max_out, max_in, max_height, max_width = config.max_shape
        self.max_shape = config.max_shape
        self.weight_norm = config.weight_norm
        self.activation = ACTIVATIONS[config.decoder_activation]
        self.is_centered = config.kernel_crop == "center"
        self.rank = config.rank
        self.expand = nn.Linear(channels, 4 * channels)
        self.hidden = nn.Linear(4 * channels, 8 * channels)
        self.factors = nn.Linear(8 * channels, 2 * config.rank * config.rank)
        self.out_output = nn.Linear(config.rank, max_out * max_height)
        self.in_output = nn.Linear(config.rank, max_in * max_width)
        self.class_output = nn.Linear(config.rank, config.num_classes)
        self.vectors = VectorDecoder(config)

    def scale_first_predictions(self) -> None:
        """Brings the first predictions of an untrained decoder close to their mean.

        A product of two small factors would be tiny and have no gradient, so activations keep unit variance up to the
        factors (He et al. 2015), and only the product is small.
        """
        for layer in (self.expand, self.hidden, self.factors):
            _shrink_layer(layer, DEFAULT_TO_HE)
        for layer in (self.out_output, self.in_output, self.class_output):
            _shrink_layer(layer, 1 / math.sqrt(3 * FIRST_PRODUCT_STD))
        _shrink_layer(self.vectors.output)

    def forward(
        self, embeddings: Tensor, targets: Sequence[Target], *, seed: int = 0, max_elements: int | None = None
    ) -> Iterator[DecodedGroup]:
        """As ``TiledDecoder``."""
        yield from self.vectors(embeddings, targets)
        matrices = [target for target in targets if target.role not in VECTOR_ROLES]
        if not matrices:
            return
        embeddings = embeddings.to(self.expand.weight.dtype)
        features = self.activation(self.expand(embeddings[[target.node for target in matrices]]))
        features = self.factors(self.activation(self.hidden(features)))
        features = self.activation(torch.unflatten(features, 1, (2, self.rank, self.rank)))  # (nodes, 2, r, r)
        layers: dict[Corner, Layer] = {}  # weight and bias of the last layers for each corner of each target
        for side, layer in enumerate((self.out_output, self.in_output)):
            corners = sorted({self._corners(target)[side] for target in matrices})
            indices = [(slice(0, channels), slice(start, stop)) for _, channels, start, stop in corners]
            layers.update(zip(corners, layer_slices(layer, (self.max_shape[side], -1), indices), strict=True))
        for (_, shape), members in grouped(enumerate(matrices), lambda item: role_and_shape(item[1])).items():
            scale = weight_scale(shape) if self.weight_norm else 1.0
            for part in parts(members, math.prod(shape), max_elements):
                some = [target for _, target in part]
                blocks = self._product(features[[place for place, _ in part]], some[0], layers, scale)
                yield some, _as_tensors(blocks, some, seed=seed)

    def _corners(self, target: Target) -> tuple[Corner, Corner]:
        """What a target needs of each of the two last layers."""
        height, width = _kernel_slices(target.kernel, self.max_shape[2:], is_centered=self.is_centered)
        out_channels, in_channels = map(min, zip(target.channels, self.max_shape[:2], strict=True))
        return (0, out_channels, height.start, height.stop), (1, in_channels, width.start, width.stop)

    def _product(self, features: Tensor, target: Target, layers: Mapping[Corner, Layer], scale: float) -> Tensor:
        """Scaled blocks (P, o, i, h, w) from features (P, 2, r, r)."""
        left_corner, right_corner = self._corners(target)
        if target.role is Role.CLASS_MATRIX:
            left = self.class_output(features[:, 0])[:, :, : target.channels[0], None]  # (P, r, K, 1)
        else:
            left = sliced_linear(features[:, 0], *layers[left_corner])  # (P, r, o, h)
        left = left * (scale / math.sqrt(self.rank))
        right = sliced_linear(features[:, 1], *layers[right_corner])  # (P, r, i, w)
        product = left.flatten(2).transpose(1, 2) @ right.flatten(2)  # (P, o * h, i * w)
        product = torch.unflatten(torch.unflatten(product, 2, right.shape[2:]), 1, left.shape[2:])  # (P, o, h, i, w)
        return resize(product.permute(0, 1, 3, 2, 4), target.kernel)


DECODERS: dict[str, Callable[[GHNConfig], TiledDecoder | LowRankDecoder]] = {
    "tiled": TiledDecoder,
    "low_rank": LowRankDecoder,
}


@torch.no_grad()
def _shrink_layer(layer: nn.Linear, shrinkage: float = LAST_LAYER_SHRINKAGE) -> None:
    """Divides a layer's weight and clears its bias."""
    layer.weight.div_(shrinkage)
    layer.bias.zero_()


def grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """The items by key, both in order of first appearance."""
    groups: dict[Key, list[Item]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups


def parts(members: list[Item], elements: int, max_elements: int | None) -> Iterator[list[Item]]:
    """Splits a group so that no part has more than ``max_elements`` values, as far as single members allow."""
    size = len(members) if max_elements is None else max(1, max_elements // elements)
    for start in range(0, len(members), size):
        yield members[start : start + size]


def _kernel_slices(kernel: tuple[int, int], limits: tuple[int, int], *, is_centered: bool) -> tuple[slice, slice]:
    """The part of a grid of ``limits`` positions that a kernel takes; all of an axis where the kernel is larger."""
    if not is_centered:
        return slice(0, min(kernel[0], limits[0])), slice(0, min(kernel[1], limits[1]))
    top, left = max(0, limits[0] // 2 - kernel[0] // 2), max(0, limits[1] // 2 - kernel[1] // 2)
    bottom, right = limits[0] // 2 + math.ceil(kernel[0] / 2), limits[1] // 2 + math.ceil(kernel[1] / 2)
    return slice(top, min(limits[0], bottom)), slice(left, min(limits[1], right))


def resize(blocks: Tensor, kernel: tuple[int, int]) -> Tensor:
    """Interpolates blocks (P, o, i, h, w) to a kernel that is larger than the grid."""
    if blocks.shape[3:] == kernel:
        return blocks
    flat = blocks.flatten(0, 1)
    resized = functional.interpolate(flat, kernel, mode="bilinear", align_corners=False)
    return torch.unflatten(resized, 0, blocks.shape[:2])


def weight_scale(shape: tuple[int, ...]) -> float:
    """The factor for a weight of two or more axes: sqrt(beta / fan-in), which keeps the variance of activations.

    Beta is 1 where no ReLU follows, 2 elsewhere. Position grids are not scaled.

    Args:
        shape: The whole tensor's shape in torch's layout, after tiling.
    """
    if len(shape) >= 3 and shape[0] == 1 and shape[2] >= POSITION_GRID_MIN_SIDE:
        return 1.0
    height, width = (*shape[2:], 1, 1)[:2]
    is_depthwise_or_row = len(shape) >= 3 and (shape[1] == 1 or (len(shape) >= 4 and height < width))
    beta = 1.0 if is_depthwise_or_row else 2.0
    return math.sqrt(beta / math.prod(shape[1:]))


def _as_tensors(blocks: Tensor, targets: Sequence[Target], *, seed: int) -> Tensor:
    """Blocks (P, o, i, h, w), already of the right sizes, with the axes of their tensors: (P, *shape).

    A position embedding (1, tokens, i) has drawn rows for class and other prefix tokens, then the grid in row-major
    order. Hypernetworks were trained without class tokens, so these rows are N(0, 0.02) as in the reference, but drawn
    from the request's seed. All targets agree in role and shape.
    """
    shape = targets[0].shape
    if targets[0].role is not Role.POSITION:
        return blocks.reshape(len(targets), *blocks.shape[1:3], *shape[2:])
    grid = blocks.flatten(3).transpose(2, 3)  # (P, 1, g * g, i)
    num_prefix = shape[1] - grid.shape[2]
    if num_prefix > 0:
        generators = (drawn_generator(seed, target.draw) for target in targets)
        drawn = [torch.randn(1, num_prefix, grid.shape[3], generator=generator) for generator in generators]
        grid = torch.cat(((torch.stack(drawn) * CLASS_TOKEN_STD).to(grid), grid), dim=2)
    return grid[:, :, : shape[1]]


def drawn_generator(seed: int, draw: int) -> torch.Generator:
    """A generator for one tensor (``draw`` is its index), so that its values do not depend on what else is drawn."""
    mixed = (seed * 0x9E3779B97F4A7C15 + (draw + 1) * 0xD1B54A32D192ED03) % 2**64
    mixed ^= mixed >> 31
    mixed = mixed * 0xBF58476D1CE4E5B9 % 2**64
    return torch.Generator().manual_seed((mixed ^ (mixed >> 29)) % 2**63)
