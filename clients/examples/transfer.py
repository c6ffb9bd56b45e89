"""Grows a trained network: a wider and deeper one starts with its function. ``python transfer.py``.

The images are stripes in noise, and their class is the direction of the stripes, so that nothing has to be fetched.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from ghn_client import GHNClient

CLASSES, SIZE = 4, 12


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
    stem = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES)]
    return nn.Sequential(*stem, *(Block(width) for _ in range(depth)), *head)


def draw(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (count, 3, S, S) and the direction of their stripes (count,)."""
    labels = torch.randint(CLASSES, (count,), generator=generator)
    angles = labels * torch.pi / CLASSES
    phases = torch.rand(count, 1, 1, generator=generator) * 2 * torch.pi
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    along = rows * angles.cos()[:, None, None] + columns * angles.sin()[:, None, None]
    stripes = torch.sin(along + phases)[:, None].expand(-1, 3, -1, -1)
    return stripes + torch.randn(count, 3, SIZE, SIZE, generator=generator), labels


def train(network: nn.Module, steps: int) -> nn.Module:
    """Trains on ``steps`` batches of fresh images."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        images, labels = draw(32, generator)
        optimizer.zero_grad()
        functional.cross_entropy(network.train()(images), labels).backward()
        optimizer.step()
    return network.eval()


def accuracy(network: nn.Module) -> float:
    """Share of 512 fresh images that the network gets right."""
    images, labels = draw(512, torch.Generator().manual_seed(2))
    with torch.no_grad():
        return (network.eval()(images).argmax(1) == labels).float().mean().item()


def compare(steps_of_source: int = 100, steps: int = 10) -> tuple[float, float, float]:
    """Accuracy of a large network that starts from a trained small one, before and after ``steps``, and by default."""
    torch.manual_seed(0)
    small, grown, default = build(8, 1), build(12, 2), build(12, 2)
    train(small, steps_of_source)
    with GHNClient.embedded() as client:
        prediction = client.predict(grown, torch.zeros(1, 3, SIZE, SIZE), source=small)
    prediction.load_into(grown)
    images, _ = draw(8, torch.Generator().manual_seed(3))
    print(f"{prediction.transfer}; outputs differ by {prediction.verify(small, grown, images):.1e}")
    start = accuracy(grown)
    return start, accuracy(train(grown, steps)), accuracy(train(default, steps))


if __name__ == "__main__":
    start, grown, default = compare()
    print(f"at once {start:.1%}; after 10 steps {grown:.1%}, from torch's own start {default:.1%}")
