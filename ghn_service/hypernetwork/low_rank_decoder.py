"""A decoder without repetition: every weight is the product of two factors that cover it whole.

Legend: T nodes, P tensors of a group, C hidden channels, (h, w) kernel, (o, i) channels, K classes, r rank.

Reference: Zhou et al. 2024, LoGAH (arXiv:2405.16287), section 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ghn_service.hypernetwork.activations import ACTIVATIONS
from ghn_service.hypernetwork.blocks import (
    VECTOR_ROLES,
    DecodedGroup,
    Request,
    as_tensors,
    grouped,
    kernel_slices,
    parts,
    resize,
    role_and_shape,
)
from ghn_service.hypernetwork.config import GHNConfig
from ghn_service.hypernetwork.features import Role, Target
from ghn_service.hypernetwork.initialization import shrink_layer
from ghn_service.hypernetwork.scaling import weight_scale
from ghn_service.hypernetwork.slices import sliced_linear, take_slices
from ghn_service.hypernetwork.vector_decoder import VectorDecoder

FIRST_PRODUCT_STD = 0.1
# Linear layers start uniform with variance 1 / (3 fan-in); He's variance before a ReLU is 2 / fan-in.
DEFAULT_TO_HE = 1 / math.sqrt(6)

# (side: 0 out or 1 in, channels, first position, position after the last)
Corner = tuple[int, int, int, int]
Layer = tuple[Tensor, Tensor]


class LowRankDecoder(nn.Module):
    r"""Decodes each weight as a product of two factors that cover it whole, in the manner of LoGAH.

    .. math:: W[o, i, y, x] = r^{-1/2} \sum_k A[k, o, y] \, B[k, i, x]

    A multilayer perceptron gives 2r vectors of r features per node; one linear layer shared by all nodes spreads each
    over ``max_shape[0]`` channels times ``max_shape[2]`` positions (A) or ``max_shape[1]`` times ``max_shape[3]`` (B).
    Only layers wider than ``max_shape`` are repeated.

    Args:
        config: Sizes.
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
            shrink_layer(layer, DEFAULT_TO_HE)
        for layer in (self.out_output, self.in_output, self.class_output):
            shrink_layer(layer, 1 / math.sqrt(3 * FIRST_PRODUCT_STD))
        shrink_layer(self.vectors.output)

    def forward(
        self, embeddings: Tensor, requests: Sequence[Request], *, seed: int = 0, max_elements: int | None = None
    ) -> Iterator[DecodedGroup]:
        """Decodes every request once; see ``ParameterDecoder``."""
        yield from self.vectors(embeddings, requests)
        matrices = [index for index, request in enumerate(requests) if request.target.role not in VECTOR_ROLES]
        if not matrices:
            return
        features = self.activation(self.expand(embeddings[[requests[index].row for index in matrices]]))
        features = self.factors(self.activation(self.hidden(features)))
        features = self.activation(torch.unflatten(features, 1, (2, self.rank, self.rank)))  # (nodes, 2, r, r)
        place = {index: position for position, index in enumerate(matrices)}
        factors = self._factors([requests[index].target for index in matrices])
        for (_, shape), members in grouped(matrices, lambda index: role_and_shape(requests[index])).items():
            target = requests[members[0]].target
            scale = weight_scale(shape) if self.weight_norm else 1.0
            for part in parts(members, math.prod(shape), max_elements):
                blocks = self._product(features[[place[index] for index in part]], target, factors, scale)
                yield DecodedGroup(tuple(part), as_tensors(blocks, part, requests, seed=seed))

    def _factors(self, targets: Sequence[Target]) -> dict[Corner, Layer]:
        """Weight and bias of the last layers for each of the two corners of each target."""
        layers: dict[Corner, Layer] = {}
        for layer, max_channels, side in (
            (self.out_output, self.max_shape[0], 0),
            (self.in_output, self.max_shape[1], 1),
        ):
            corners = sorted({self._corners(target)[side] for target in targets})
            indices = [(slice(0, channels), slice(start, stop)) for _, channels, start, stop in corners]
            weights = take_slices(torch.unflatten(layer.weight, 0, (max_channels, -1)), indices)
            biases = take_slices(torch.unflatten(layer.bias, 0, (max_channels, -1)), indices)
            layers.update(zip(corners, zip(weights, biases, strict=True), strict=True))
        return layers

    def _corners(self, target: Target) -> tuple[Corner, Corner]:
        """What a target needs of each of the two last layers."""
        height, width = kernel_slices(target.kernel, self.max_shape[2:], is_centered=self.is_centered)
        out_channels, in_channels = map(min, zip(target.channels, self.max_shape[:2], strict=True))
        return (0, out_channels, height.start, height.stop), (1, in_channels, width.start, width.stop)

    def _product(self, features: Tensor, target: Target, factors: Mapping[Corner, Layer], scale: float) -> Tensor:
        """Scaled blocks (P, o, i, h, w) from features (P, 2, r, r)."""
        left_corner, right_corner = self._corners(target)
        if target.role is Role.CLASS_MATRIX:
            left = self.class_output(features[:, 0])[:, :, : target.channels[0], None]  # (P, r, K, 1)
        else:
            left = sliced_linear(features[:, 0], *factors[left_corner])  # (P, r, o, h)
        left = left * (scale / math.sqrt(self.rank))
        right = sliced_linear(features[:, 1], *factors[right_corner])  # (P, r, i, w)
        product = left.flatten(2).transpose(1, 2) @ right.flatten(2)  # (P, o * h, i * w)
        product = torch.unflatten(torch.unflatten(product, 2, right.shape[2:]), 1, left.shape[2:])  # (P, o, h, i, w)
        return resize(product.permute(0, 1, 3, 2, 4), target.kernel)
