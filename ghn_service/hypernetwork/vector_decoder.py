"""The decoder of one-dimensional tensors, common to all hypernetworks.

Reference: Knyazev et al. 2021 (arXiv:2110.13100), appendix A.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ghn_service.hypernetwork.activations import ACTIVATIONS
from ghn_service.hypernetwork.blocks import VECTOR_ROLES, DecodedGroup, Request, grouped, role_and_shape
from ghn_service.hypernetwork.config import GHNConfig
from ghn_service.hypernetwork.features import Role
from ghn_service.hypernetwork.scaling import scale_bias, scale_norm_weight


class VectorDecoder(nn.Module):
    """Weights of normalisations (first row) and biases (second row), and the classifier's bias.

    Args:
        config: Sizes.
    """

    def __init__(self, config: GHNConfig) -> None:
        super().__init__()
        channels, length = config.hidden_channels, config.vector_length
        self.weight_norm = config.weight_norm
        self.activation = ACTIVATIONS[config.decoder_activation]
        self.hidden = nn.Linear(channels, 2 * channels)
        self.output = nn.Linear(2 * channels, 2 * length)
        self.class_bias = nn.Linear(length, config.num_classes)

    def forward(self, embeddings: Tensor, requests: Sequence[Request]) -> Iterator[DecodedGroup]:
        """Decodes the vectors among the requests."""
        wanted = [index for index, request in enumerate(requests) if request.target.role in VECTOR_ROLES]
        if not wanted:
            return
        rows = sorted({requests[index].row for index in wanted})
        place = {row: position for position, row in enumerate(rows)}
        hidden = self.activation(self.hidden(embeddings[rows]))
        decoded = torch.unflatten(self.output(hidden), 1, (2, -1))  # (nodes, 2, length)
        values = {Role.VECTOR: decoded[:, 0], Role.BIAS: decoded[:, 1]}
        if any(requests[index].target.role is Role.CLASS_BIAS for index in wanted):
            values[Role.CLASS_BIAS] = self.class_bias(self.activation(decoded[:, 1]))
        if self.weight_norm:
            values = {
                role: scale_norm_weight(value) if role is Role.VECTOR else scale_bias(value)
                for role, value in values.items()
            }
        for (role, shape), members in grouped(wanted, lambda index: role_and_shape(requests[index])).items():
            nodes = [place[requests[index].row] for index in members]
            length = min(math.prod(shape), values[role].shape[1])
            block = tuple(length if size > 1 else 1 for size in shape) if math.prod(shape) > 1 else shape
            yield DecodedGroup(tuple(members), values[role][nodes, :length].reshape(len(nodes), *block))
