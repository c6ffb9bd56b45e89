"""Small residual networks of images, trained as far as a test can tell."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

EXAMPLE = torch.zeros(1, 3, 16, 16)


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(x + self.bn2(self.conv2(y)))


class Residual(nn.Module):
    """A residual network of one stage."""

    def __init__(self, width: int = 8, depth: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.fc = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.blocks(functional.relu(self.bn1(self.conv1(x))))
        return self.fc(y.mean((2, 3)))


def trained(seed: int = 1, **sizes: int) -> Residual:
    """A network in evaluation mode, with values that no initialisation gives."""
    torch.manual_seed(seed)
    network = Residual(**sizes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in network.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.weight.uniform_(0.5, 1.5, generator=generator)
                part.bias.normal_(0.0, 0.2, generator=generator)
                part.running_mean.normal_(0.0, 0.2, generator=generator)
                part.running_var.uniform_(0.5, 1.5, generator=generator)
    return network.eval()


def images(count: int = 4) -> torch.Tensor:
    """Noise, (count, 3, 16, 16)."""
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(5))
