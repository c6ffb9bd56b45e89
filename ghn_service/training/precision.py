"""How target networks compute: number format, and detours around the slow paths of torch and libc on processors.

Measured with torch 2.13 on one core: both passes of a strided depthwise convolution take up to 14 times as long in
bfloat16 as in float32, and those of fused attention seven times; plain products halve the latter at least. On a GPU
nothing is changed.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ghn_architectures.layers import Conv2d

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # names of parameters in malloc.h


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Number format of target networks: bfloat16 where asked for, or for ``auto`` where the device computes with it."""
    if name == "auto":
        fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


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


def avoid_slow_layers(module: nn.Module) -> nn.Module:
    """Lets strided depthwise convolutions compute in float32, as bfloat16 is slow there; returns ``module``."""
    for layer in module.modules():
        if (
            isinstance(layer, nn.Conv2d)
            and type(layer) in (nn.Conv2d, Conv2d)
            and layer.groups == layer.in_channels > 1
            and max(layer.stride) > 1
            and max(layer.kernel_size) > 1
        ):
            layer.__class__ = SinglePrecisionConv2d  # the same layer in all else: names, parameters, hooks
    return module


@contextmanager
def target_passes(device: torch.device, precision: torch.dtype) -> Iterator[None]:
    """A context for the passes of a target network in a number format (autocast; float32 for none).

    Weights may change within it: autocast's cache would keep the first ones it cast until the context ends.
    """
    is_half = precision != torch.float32
    attention = sdpa_kernel(SDPBackend.MATH) if is_half and device.type == "cpu" else nullcontext()
    with torch.autocast(device.type, precision, enabled=is_half, cache_enabled=False), attention:
        yield


def keep_freed_memory() -> None:
    """Tells the C library to keep freed memory for reuse (glibc alone understands).

    By default it returns arrays of more than 128 KiB to the system at once and gets them back as fresh pages, which the
    kernel must clear first; a training step spends a third of its time on that.
    """
    if sys.platform.startswith("linux") and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        for name, value in ((_MMAP_THRESHOLD, 32 << 20), (_TRIM_THRESHOLD, (1 << 31) - 1), (_TOP_PAD, 64 << 20)):
            mallopt(name, value)
