"""The small ReLU networks g that are added to a frozen network f: one to train, one with weights in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn


class SideNetwork(nn.Module):
    """A trainable ReLU network whose last layer starts at zero, so that f + g starts as f."""

    def __init__(self, in_features: int, hidden: Sequence[int], outputs: int) -> None:
        super().__init__()
        widths = [in_features, *hidden, outputs]
        self.layers = nn.ModuleList(nn.Linear(inputs, out) for inputs, out in pairwise(widths))
        for value in self.layers[-1].parameters():
            nn.init.zeros_(value)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(B, ...) to (B, C)."""
        features = inputs.flatten(1)
        for layer in self.layers[:-1]:
            features = torch.relu(layer(features))
        output: torch.Tensor = self.layers[-1](features)
        return output


class ClosedFormSideNetwork(nn.Module):
    """A ReLU network along few directions, with weights that were computed, not trained.

        t = (x - center) U^T            (B, P)   projections
        h = relu(t[select] - knots)     (B, M1)  first hidden layer
        h = relu(h W^T + b)             (B, M2)  second hidden layer, only of three-layer networks
        g = h A^T + c                   (B, C)

    As a function it is an ordinary network with one or two hidden layers; projections are shared so that it stays
    small. It computes in its own precision and returns that of the input.

    Args:
        center: (D,) subtracted first.
        directions: (P, D) unit vectors U.
        select: (M1,) which projection each neuron reads.
        knots: (M1,) where each neuron switches on.
        output_weight: (C, M) with M the width of the last hidden layer.
        output_bias: (C,).
        mixing: (M2, M1) and (M2,) of the second hidden layer, or ``None``.
    """

    def __init__(
        self,
        *,
        center: torch.Tensor,
        directions: torch.Tensor,
        select: torch.Tensor,
        knots: torch.Tensor,
        output_weight: torch.Tensor,
        output_bias: torch.Tensor,
        mixing: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.center, self.directions = nn.Buffer(center), nn.Buffer(directions)
        self.select, self.knots = nn.Buffer(select), nn.Buffer(knots)
        self.output_weight, self.output_bias = nn.Buffer(output_weight), nn.Buffer(output_bias)
        if mixing is not None:
            self.mixing_weight, self.mixing_bias = map(nn.Buffer, mixing)
        self.depth = 2 if mixing is None else 3

    @property
    def neurons(self) -> int:
        """ReLU neurons in all hidden layers."""
        return len(self.knots) + (len(self.mixing_bias) if self.depth == 3 else 0)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(B, ...) to (B, C), in the precision of ``inputs``."""
        centred = inputs.flatten(1).to(self.center.dtype) - self.center
        projections = centred @ self.directions.T
        hidden = torch.relu(projections[:, self.select] - self.knots)
        if self.depth == 3:
            hidden = torch.relu(hidden @ self.mixing_weight.T + self.mixing_bias)
        return (hidden @ self.output_weight.T + self.output_bias).to(inputs.dtype)
