"""Strided 1x1 convolutions on channels_last images.

torch 2.13's CPU kernel for the gradient of such a weight writes past its buffer where 16 does not divide the channels
(seen with 4, 8 and 12 channels on images of 56 pixels and more), which ends the process sooner or later. Our layer
takes a strided view instead.
"""

from __future__ import annotations

import subprocess
import sys

import torch
from torch import nn

from ghn_architectures.layers import Conv2d


def test_the_view_computes_the_same() -> None:
    torch.manual_seed(0)
    ours, plain = Conv2d(8, 16, 1, stride=2), nn.Conv2d(8, 16, 1, stride=2)
    plain.load_state_dict(ours.state_dict())
    images = torch.randn(2, 8, 9, 9)
    torch.testing.assert_close(ours(images), plain(images))


def test_a_process_survives_its_gradients() -> None:
    program = """
import torch
from ghn_architectures.layers import Conv2d
layer = Conv2d(8, 16, 1, stride=2).to(memory_format=torch.channels_last)
for _ in range(40):
    images = torch.randn(4, 8, 64, 64).to(memory_format=torch.channels_last).requires_grad_()
    layer(images).sum().backward()
    waste = [torch.randn(7 * size + 1) for size in range(50)]
"""
    subprocess.run([sys.executable, "-c", program], check=True)
