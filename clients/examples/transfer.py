"""Grows a trained network: a wider and deeper one starts with its function: ``python transfer.py``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from common import EXAMPLE, accuracy, connect, image_loaders, parser, train
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, C, S, S) to such."""
        y = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(x + self.norm2(self.conv2(y)))


def build(width: int, depth: int) -> nn.Module:
    """A residual network of one stage."""
    stem = [nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10)]
    return nn.Sequential(*stem, *(Block(width) for _ in range(depth)), *head)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains a small network, grows it, and trains a tenth as long from there and from torch's own start."""
    options = parser(__doc__).parse_args(arguments)
    training, test = image_loaders(options)
    torch.manual_seed(0)
    small, grown, default = build(8, 1), build(12, 2), build(12, 2)
    train(small, training, options.steps).eval()
    with connect(options.address) as client:  # another server has the source only if its operator added it
        prediction = client.predict(grown, EXAMPLE, source=small)
    prediction.load_into(grown)
    images, _ = next(iter(test))
    print(f"{prediction.transfer}; outputs differ by {prediction.verify(small, grown, images):.1e}")
    start, few = accuracy(grown, test), max(options.steps // 10, 1)
    scores = [accuracy(train(network, training, few), test) for network in (grown, default)]
    print(f"at once {start:.1%}; after {few} steps {scores[0]:.1%}, from the default initialisation {scores[1]:.1%}")


if __name__ == "__main__":
    main(sys.argv[1:])
