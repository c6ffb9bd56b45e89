"""The operations of cells: the primitives of DeepNets-1M (Knyazev et al. 2021, arXiv:2110.13100, table 1).

Shapes: B examples, C channels, H x W positions, T = H * W tokens.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ghn_architectures.attention import EncoderBlock, heads_for
from ghn_architectures.layers import Conv2d, SqueezeExcite, make_norm
from ghn_service.errors import InvalidOptionError


class ConvolutionOperation(nn.Sequential):
    """ReLU, convolution, norm.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel: Odd window size.
        stride: Stride.
        norm: ``batch`` or ``none``.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, *, stride: int, norm: str) -> None:
        bias = norm == "none"
        conv = Conv2d(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=bias)
        super().__init__(nn.ReLU(), conv, *_norms(norm, out_channels))


class DepthwiseOperation(nn.Sequential):
    """ReLU, depthwise convolution (dilated or not), 1x1 convolution, norm."""

    def __init__(self, channels: int, kernel: int, *, stride: int, dilation: int, norm: str) -> None:
        bias = norm == "none"
        depthwise = Conv2d(
            channels,
            channels,
            kernel,
            stride=stride,
            padding=dilation * (kernel // 2),
            dilation=dilation,
            groups=channels,
            bias=bias,
        )
        super().__init__(nn.ReLU(), depthwise, Conv2d(channels, channels, 1, bias=bias), *_norms(norm, channels))


class FactorizedOperation(nn.Sequential):
    """ReLU, 1x7 convolution, 7x1 convolution, norm."""

    def __init__(self, channels: int, *, stride: int, norm: str) -> None:
        bias = norm == "none"
        rows = Conv2d(channels, channels, (1, 7), stride=(1, stride), padding=(0, 3), bias=bias)
        columns = Conv2d(channels, channels, (7, 1), stride=(stride, 1), padding=(3, 0), bias=bias)
        super().__init__(nn.ReLU(), rows, columns, *_norms(norm, channels))


class AttentionOperation(nn.Module):
    """A transformer block over all positions of a feature."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block = EncoderBlock(channels, num_heads=heads_for(channels, 16), mlp_ratio=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        height, width = x.shape[2], x.shape[3]
        tokens = self.block(x.flatten(2).transpose(1, 2))
        return tokens.transpose(1, 2).unflatten(2, (height, width))  # type: ignore[no-any-return]


def _norms(norm: str, channels: int) -> tuple[nn.Module, ...]:
    return () if norm == "none" else (make_norm(norm, channels),)


def _skip(channels: int, stride: int, norm: str) -> nn.Module:
    return nn.Identity() if stride == 1 else ConvolutionOperation(channels, channels, 1, stride=stride, norm=norm)


def _gate(channels: int, stride: int, norm: str) -> nn.Module:
    gate = SqueezeExcite(channels, max(channels // 4, 8))
    return gate if stride == 1 else nn.Sequential(nn.MaxPool2d(3, stride=stride, padding=1), gate)


def _convolution(kernel: int) -> Callable[[int, int, str], nn.Module]:
    return lambda channels, stride, norm: ConvolutionOperation(channels, channels, kernel, stride=stride, norm=norm)


def _depthwise(kernel: int, dilation: int) -> Callable[[int, int, str], nn.Module]:
    return lambda channels, stride, norm: DepthwiseOperation(
        channels, kernel, stride=stride, dilation=dilation, norm=norm
    )


CELL_OPERATIONS: dict[str, Callable[[int, int, str], nn.Module]] = {
    "max_pool_3x3": lambda channels, stride, norm: nn.MaxPool2d(3, stride=stride, padding=1),
    "avg_pool_3x3": lambda channels, stride, norm: nn.AvgPool2d(3, stride=stride, padding=1),
    "skip_connect": _skip,
    "sep_conv_3x3": _depthwise(3, 1),
    "sep_conv_5x5": _depthwise(5, 1),
    "dil_conv_3x3": _depthwise(3, 2),
    "dil_conv_5x5": _depthwise(5, 2),
    "conv_1x1": _convolution(1),
    "conv_7x1_1x7": lambda channels, stride, norm: FactorizedOperation(channels, stride=stride, norm=norm),
    "conv_3x3": _convolution(3),
    "conv_5x5": _convolution(5),
    "conv_7x7": _convolution(7),
    "msa": lambda channels, stride, norm: AttentionOperation(channels),
    "cse": _gate,
}


def make_operation(name: str, channels: int, *, stride: int, norm: str) -> nn.Module:
    """The operation called ``name``, from (B, C, H, W) to (B, C, ceil(H / stride), ceil(W / stride)).

    Raises:
        InvalidOptionError: There is no such operation.
    """
    if name not in CELL_OPERATIONS:
        raise InvalidOptionError(f"no cell operation is called {name!r}; known are {', '.join(CELL_OPERATIONS)}")
    return CELL_OPERATIONS[name](channels, stride, norm)
