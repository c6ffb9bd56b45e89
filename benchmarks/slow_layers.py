"""Layers whose gradients torch computes slowly in bfloat16 on a processor, beside what ``training/passes.py`` does.

Prints one JSON line per layer: milliseconds of processor time forward and backward, for 64 images.

Run with ``python -m benchmarks.slow_layers``.
"""

from __future__ import annotations

import copy
import json
import time

import torch
from torch import Tensor, nn

from ghn_service.training.memory import keep_freed_memory
from ghn_service.training.passes import avoid_slow_layers, target_passes

REPEATS = 5
CPU = torch.device("cpu")


class Attention(nn.Module):
    """Fused attention of ``heads`` heads over tokens (B, N, C), without projections."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        heads = torch.unflatten(tokens, 2, (self.heads, -1)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)


def depthwise(channels: int, size: int, kernel: int, stride: int) -> tuple[str, nn.Module, Tensor]:
    name = f"depthwise {kernel}x{kernel}, stride {stride}, {channels} channels, {size}x{size}"
    layer = nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels)
    return name, layer, torch.randn(64, channels, size, size).contiguous(memory_format=torch.channels_last)


def attention(tokens: int, channels: int, heads: int) -> tuple[str, nn.Module, Tensor]:
    return (
        f"attention, {tokens} tokens, {heads} heads of {channels // heads}",
        Attention(heads),
        torch.randn(64, tokens, channels),
    )


CASES = (
    depthwise(64, 32, 3, 1),
    depthwise(192, 16, 3, 2),
    depthwise(64, 32, 5, 2),
    depthwise(64, 16, 5, 1),
    depthwise(32, 16, 7, 1),
    attention(64, 64, 4),
)


def milliseconds(layer: nn.Module, example: Tensor, *, detour: bool, precision: torch.dtype) -> float:
    """Processor time of both passes."""
    leaf = example.to(precision).requires_grad_()

    def passes() -> None:
        layer(leaf).float().sum().backward()

    layer = avoid_slow_layers(copy.deepcopy(layer)) if detour else layer
    context = (
        target_passes(CPU, precision)
        if detour
        else torch.autocast("cpu", precision, enabled=precision != torch.float32)
    )
    with context:
        passes()
        started = time.process_time()
        for _ in range(REPEATS):
            passes()
    return 1000 * (time.process_time() - started) / REPEATS


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_freed_memory()
    for name, layer, example in CASES:
        times = {
            "float32": milliseconds(layer, example, detour=False, precision=torch.float32),
            "bfloat16": milliseconds(layer, example, detour=False, precision=torch.bfloat16),
            "detour": milliseconds(layer, example, detour=True, precision=torch.bfloat16),
        }
        print(json.dumps({"benchmark": "slow_layers", "layer": name, **{k: round(v, 1) for k, v in times.items()}}))


if __name__ == "__main__":
    main()
