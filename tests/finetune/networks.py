"""Small networks that the fine-tuning tests share."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from ghn_client.finetune.factored import FactoredLayer


def small_cnn(*, seed: int = 0, classes: int = 4) -> nn.Sequential:
    """conv, BatchNorm, conv without norm, factored linear layer, head; for inputs (B, 3, 8, 8)."""
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        FactoredLayer(nn.Linear(8, 8), 2),
        nn.Linear(8, classes),
    )
    randomize_statistics(network)
    return network


def mlp(*sizes: int, seed: int = 0) -> nn.Sequential:
    """Linear and ReLU layers of the given widths, without ReLU at the end."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with BatchNorm round an identity shortcut."""

    def __init__(self, channels: int, inner: int | None = None) -> None:
        super().__init__()
        inner = inner or channels
        self.conv1 = nn.Conv2d(channels, inner, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, features):
        out = torch.relu(self.bn1(self.conv1(features)))
        return torch.relu(self.bn2(self.conv2(out)) + features)


class ResidualNetwork(nn.Module):
    """A stem, two residual blocks, pooling and a head; for inputs (B, 3, H, W)."""

    def __init__(self, channels: int = 8, classes: int = 4, *, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.blocks = nn.Sequential(ResidualBlock(channels), ResidualBlock(channels))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, classes)
        randomize_statistics(self)

    def forward(self, images):
        features = self.blocks(torch.relu(self.norm(self.stem(images))))
        return self.head(torch.flatten(self.pool(features), 1))


def randomize_statistics(network: nn.Module) -> None:
    """Gives BatchNorm layers other statistics and affine values than those that make them trivial."""
    for layer in network.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.running_mean.normal_(0.0, 0.3)
            layer.running_var.uniform_(0.5, 2.0)
            layer.weight.data.uniform_(0.5, 1.5)
            layer.bias.data.normal_(0.0, 0.3)


def train_a_little(
    module: nn.Module, groups: list[dict], inputs: torch.Tensor, *, steps: int = 3, train: bool = True
) -> None:
    """A few steps towards small outputs, in train mode unless told otherwise; leaves the module in eval mode."""
    module.train(train)
    optimizer = torch.optim.SGD(groups, lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        module(inputs).square().sum().backward()
        optimizer.step()
    module.eval()
