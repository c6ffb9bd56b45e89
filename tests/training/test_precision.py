"""Detours around slow layers change nothing but the number format."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ghn_service.training.precision import SinglePrecisionConv2d, avoid_slow_layers, target_passes

CPU = torch.device("cpu")


def depthwise(kernel: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(6, 6, kernel, stride, kernel // 2, groups=6)


@pytest.mark.parametrize(
    ("layer", "slow"),
    [
        (depthwise(3, 1), False),
        (depthwise(3, 2), True),
        (depthwise(5, 1), False),
        (depthwise(1, 2), False),
        (nn.Conv2d(6, 6, 5, 2), False),
        (nn.Conv2d(6, 6, 5, 2, groups=2), False),
        (nn.Conv2d(1, 6, 5, 2), False),
    ],
)
def test_only_slow_depthwise_layers_change(layer, slow):
    assert isinstance(avoid_slow_layers(layer), SinglePrecisionConv2d) == slow


def test_the_detour_is_the_same_convolution_in_more_digits():
    torch.manual_seed(0)
    layer = depthwise(5, 2)
    changed = avoid_slow_layers(copy.deepcopy(layer))
    images = torch.randn(2, 6, 8, 8).bfloat16()
    exact = layer(images.float())
    with target_passes(CPU, torch.bfloat16):
        result = changed(images)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result, exact.bfloat16(), rtol=0, atol=0)


def test_without_autocast_the_layer_is_unchanged():
    layer = depthwise(5, 2)
    images = torch.randn(2, 6, 8, 8)
    with target_passes(CPU, torch.float32):
        torch.testing.assert_close(avoid_slow_layers(copy.deepcopy(layer))(images), layer(images), rtol=0, atol=0)


def test_names_and_gradients_stay():
    module = nn.Sequential(depthwise(5, 2), nn.ReLU())
    before = set(module.state_dict())
    avoid_slow_layers(module)
    assert set(module.state_dict()) == before
    with target_passes(CPU, torch.bfloat16):
        module(torch.randn(2, 6, 8, 8)).float().sum().backward()
    assert module[0].weight.grad.dtype == torch.float32
    assert module[0].weight.grad.abs().sum() > 0


def test_attention_agrees_with_the_fused_one():
    heads = torch.randn(2, 2, 8, 4)
    exact = nn.functional.scaled_dot_product_attention(heads, heads, heads)
    with target_passes(CPU, torch.bfloat16):
        plain = nn.functional.scaled_dot_product_attention(heads, heads, heads)
    torch.testing.assert_close(plain.float(), exact, rtol=0.02, atol=0.02)


def test_weights_may_change_within_the_context():
    layer, images = nn.Linear(4, 4), torch.randn(2, 4)
    with target_passes(CPU, torch.bfloat16):
        layer(images)
        with torch.no_grad():
            layer.weight.add_(1.0)
        changed = layer(images)
    with target_passes(CPU, torch.bfloat16):
        torch.testing.assert_close(changed, layer(images), rtol=0, atol=0)
