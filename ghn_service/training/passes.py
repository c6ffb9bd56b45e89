"""How target networks compute: number format, and detours around the slow paths of torch on processors.

Measured with torch 2.13 on one core (``python -m benchmarks.slow_layers``): both passes of a strided depthwise
convolution take up to 14 times as long in bfloat16 as in float32, and those of fused attention seven times; plain
products halve the latter at least. On a GPU nothing is changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ghn_architectures.layers import Conv2d


class SinglePrecisionConv2d(nn.Conv2d):
    """A convolution that computes in float32 on a processor under autocast; its result has autocast's dtype."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        """The convolution of (B, C, H, W)."""
        device = input.device.type
        if device != "cpu" or not torch.is_autocast_enabled(device):
            return super().forward(input)
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return super().forward(input.float()).to(dtype)


def is_slow_in_half(layer: nn.Module) -> bool:
    """Whether a layer is a strided depthwise convolution: its gradient is slow in bfloat16 on a processor."""
    return (
        isinstance(layer, nn.Conv2d)
        and type(layer) in (nn.Conv2d, Conv2d)
        and layer.groups == layer.in_channels > 1
        and max(layer.stride) > 1
        and max(layer.kernel_size) > 1
    )


def avoid_slow_layers(module: nn.Module) -> nn.Module:
    """Lets the layers of ``module`` that are slow in bfloat16 compute in float32; returns it."""
    for layer in module.modules():
        if is_slow_in_half(layer):
            layer.__class__ = SinglePrecisionConv2d  # the same layer in all else: names, parameters, hooks
    return module


@contextmanager
def target_passes(device: torch.device, precision: torch.dtype) -> Iterator[None]:
    """A context for the passes of a target network.

    Args:
        device: Where the network is.
        precision: Number format (autocast); float32 for none.
    """
    is_half = precision != torch.float32
    attention = sdpa_kernel(SDPBackend.MATH) if is_half and device.type == "cpu" else nullcontext()
    with torch.autocast(device.type, precision, enabled=is_half), attention:
        yield
