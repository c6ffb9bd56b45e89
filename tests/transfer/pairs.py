"""Pairs of networks whose target contains the source, and how to compare them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ghn_client.onnx.export import export_architecture, read_source
from ghn_service.transfer.source import Source
from ghn_service.transfer.transfer import Transfer, transfer_weights

Export = Callable[[nn.Module, torch.Tensor], bytes]


def randomise(module: nn.Module, example: torch.Tensor, *, seed: int) -> nn.Module:
    """Weights as after a training: no norm is neutral, nothing is zero, and statistics fit the data."""
    generator = torch.Generator().manual_seed(seed)
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim <= 1:
                start = 0.75 if "weight" in name or "gamma" in name else -0.25
                parameter.copy_(torch.rand(parameter.shape, generator=generator) * 0.5 + start)
            elif parameter.ndim == 2:
                scale = 1.5 / parameter.shape[1] ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            elif any(part in name for part in ("pos", "token", "table")) or not parameter.abs().max():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        if norms:
            momenta = [norm.momentum for norm in norms]
            for norm in norms:
                norm.momentum = 1.0
            module.train()(torch.randn(8, *example.shape[1:], generator=generator))
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
                norm.running_mean.mul_(1 + 0.2 * torch.randn(norm.running_mean.shape, generator=generator))
                norm.running_var.mul_(0.75 + 0.5 * torch.rand(norm.running_var.shape, generator=generator))
    return module


def make_source(module: nn.Module, example: torch.Tensor, *, export: Export = export_architecture) -> Source:
    if export is not export_architecture:
        return Source("trained", export(module, example), module.state_dict())
    exported = read_source(module, example)
    return Source("trained", exported.structure, {**exported.values, **module.state_dict()})


def transfer_between(
    source: nn.Module, target: nn.Module, example: torch.Tensor, *, export: Export = export_architecture
) -> Transfer:
    """Transfers from one module to the other, and loads the result; ends in evaluation mode."""
    result = transfer_weights(make_source(source, example, export=export), export(target, example))
    target.load_state_dict({**result.tensors, **result.statistics}, strict=False)
    source.eval()
    target.eval()
    return result


class Residual(nn.Module):
    """A small residual network: stem, stages of basic blocks, one class layer."""

    def __init__(
        self, widths: tuple[int, ...], depths: tuple[int, ...], *, inner: float = 1.0, kernel: int = 3
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        blocks: list[nn.Module] = []
        before = widths[0]
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            for i in range(depth):
                blocks.append(Block(before, width, int(width * inner), 2 if stage and not i else 1, kernel))
                before = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(before, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Block(nn.Module):
    def __init__(self, before: int, width: int, inner: int, stride: int, kernel: int) -> None:
        super().__init__()
        pad = kernel // 2
        self.first = nn.Conv2d(before, inner, kernel, stride, pad, bias=False)
        self.first_norm = nn.BatchNorm2d(inner)
        self.last = nn.Conv2d(inner, width, kernel, 1, pad, bias=False)
        self.last_norm = nn.BatchNorm2d(width)
        self.shortcut = nn.Identity() if stride == 1 and before == width else nn.Conv2d(before, width, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.last_norm(self.last(torch.relu(self.first_norm(self.first(x)))))
        return torch.relu(y + self.shortcut(x))
