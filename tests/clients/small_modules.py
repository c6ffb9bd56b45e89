"""Small torch modules that hold what makes export and loading hard."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional


class ConvNet(nn.Module):
    """Convolutions, batch normalisation, a residual sum, in-place activations, dropout, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(x))
        y += x
        return self.fc(self.drop(self.pool(self.relu(y)).flatten(1)))


class Attention(nn.Module):
    """Multi-head attention with a class token, position embedding and layer norms."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 16))
        self.position = nn.Parameter(torch.zeros(1, 5, 16))
        self.embed = nn.Linear(12, 16)
        self.norm = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 4, dropout=0.1, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), self.embed(x)], 1) + self.position
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head((x + self.mlp(x))[:, 0])


class Tied(nn.Module):
    """Two linear layers that share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(functional.relu(self.first(x)))


class WithConstants(nn.Module):
    """Buffers and plain tensors beside weights, a parameter that nothing reads, and names that clash with values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4, affine=False)
        self.add = nn.Parameter(torch.ones(4))
        self.x = nn.Parameter(torch.full((4,), 2.0))
        self.unused = nn.Parameter(torch.ones(3))
        self.register_buffer("spread", torch.tensor([0.5, 0.25, 0.125]).view(1, 3, 1, 1))
        self.mean = torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv((x - self.mean) / self.spread)).mean((2, 3))
        return y * self.x + self.add


class Auxiliary(nn.Module):
    """A second head that exists in training mode only, as in GoogLeNet."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)
        self.auxiliary = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        y = functional.relu(self.body(x))
        return (self.head(y), self.auxiliary(y)) if self.training else self.head(y)


class InPlace(nn.Module):
    """A module whose forward is given, with one linear layer before it."""

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.change = change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.change(self.fc(x))


IMAGE = torch.zeros(2, 3, 16, 16)
EXAMPLES: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "conv": (ConvNet, IMAGE),
    "attention": (Attention, torch.zeros(2, 4, 12)),
    "tied": (Tied, torch.zeros(2, 6)),
    "constants": (WithConstants, IMAGE),
    "auxiliary": (Auxiliary, torch.zeros(2, 6)),
}


def randomized(module: nn.Module) -> nn.Module:
    """The module with every parameter and float buffer drawn, so that no two tensors are alike."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in module.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
        for name, tensor in module.named_buffers():
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif name.endswith("running_mean"):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return module
