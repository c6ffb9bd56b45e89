"""The layers that every network here is made of: torch's own, with He initialisation that can be skipped.

A hypernetwork's training builds thousands of networks only to replace their weights; under ``skip_initialization``
building one costs microseconds per layer, and its weights are whatever memory held.

References: He et al. 2015, "Delving Deep into Rectifiers" (arXiv:1502.01852); Vaswani et al. 2017 (arXiv:1706.03762)
for the transformer block, with the norm before each branch.

Shapes: B examples, C channels, H x W positions, T tokens, D = C / heads, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ghn_service.errors import InvalidOptionError

_INITIALIZE: ContextVar[bool] = ContextVar("architectures_initialize", default=True)


@contextmanager
def skip_initialization() -> Iterator[None]:
    """Within this context weights of new layers stay uninitialised memory (buffers are initialised as always)."""
    token = _INITIALIZE.set(False)
    try:
        yield
    finally:
        _INITIALIZE.reset(token)


def _initialize(layer: nn.Conv2d | nn.Linear) -> None:
    """He-normal weights (fan-in) and zero bias, unless initialisation is skipped."""
    if _INITIALIZE.get():
        nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


class Conv2d(nn.Conv2d):
    """``torch.nn.Conv2d`` with He-normal weights (fan-in) and zero bias.

    A strided 1x1 convolution of channels that 16 does not divide reads a strided view instead, which is the same:
    torch 2.13's CPU kernel for the weight's gradient writes past its buffer there if the input is channels_last
    (``tests/architectures/test_strided_pointwise.py``).
    """

    reset_parameters = _initialize

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (torch's name)
        """(B, C, H, W) -> (B, C', H', W')."""
        if self.kernel_size == (1, 1) and self.stride != (1, 1) and self.in_channels % 16:
            rows, columns = self.stride
            return F.conv2d(input[:, :, ::rows, ::columns], self.weight, self.bias, groups=self.groups)
        return super().forward(input)


class Linear(nn.Linear):
    """``torch.nn.Linear`` with He-normal weights (fan-in) and zero bias."""

    reset_parameters = _initialize


class TokenLinear(nn.Linear):
    """The linear layer of transformers: weights from a truncated normal of deviation 0.02, zero bias."""

    def reset_parameters(self) -> None:
        """Draws the weight anew, unless initialisation is skipped."""
        if _INITIALIZE.get():
            nn.init.trunc_normal_(self.weight, std=0.02)
            if self.bias is not None:
                nn.init.zeros_(self.bias)


def embedding_parameter(*shape: int, std: float = 0.02) -> nn.Parameter:
    """A free trainable tensor (position embedding, class token) from a truncated normal of deviation ``std``."""
    values = torch.empty(shape)
    if _INITIALIZE.get():
        nn.init.trunc_normal_(values, std=std)
    return nn.Parameter(values)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "leaky_relu": lambda: nn.LeakyReLU(0.1),
}


def make_activation(name: str) -> nn.Module:
    """The nonlinearity called ``name``.

    Raises:
        InvalidOptionError: There is no such name in ``ACTIVATIONS``.
    """
    if name not in ACTIVATIONS:
        raise InvalidOptionError(f"no activation is called {name!r}; known are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]()


def make_norm(name: str, channels: int) -> nn.Module:
    """Batch normalisation over ``channels``, or nothing.

    Raises:
        InvalidOptionError: ``name`` is neither ``batch`` nor ``none``.
    """
    if name == "batch":
        return nn.BatchNorm2d(channels)
    if name == "none":
        return nn.Identity()
    raise InvalidOptionError(f"no norm is called {name!r}; known are batch, none")


def conv_norm(
    in_channels: int,
    out_channels: int,
    kernel: int,
    *,
    stride: int = 1,
    groups: int = 1,
    norm: str = "batch",
    activation: str | None = None,
) -> nn.Sequential:
    """Convolution of an odd kernel, norm and activation; the convolution has a bias if no norm follows.

    (B, in_channels, H, W) -> (B, out_channels, ceil(H / stride), ceil(W / stride)).
    """
    bias, padding = norm == "none", kernel // 2
    layers: list[nn.Module] = [
        Conv2d(in_channels, out_channels, kernel, stride=stride, padding=padding, groups=groups, bias=bias)
    ]
    if norm != "none":
        layers.append(make_norm(norm, out_channels))
    if activation is not None:
        layers.append(make_activation(activation))
    return nn.Sequential(*layers)


class SqueezeExcite(nn.Module):
    """Channel gate: ``x * sigmoid(expand(relu(reduce(mean(x)))))``.

    Reference: Hu et al. 2018, "Squeeze-and-Excitation Networks" (arXiv:1709.01507).
    """

    def __init__(self, channels: int, squeezed_channels: int, *, hard: bool = False) -> None:
        super().__init__()
        self.reduce = Conv2d(channels, squeezed_channels, 1)
        self.activation = nn.ReLU()
        self.expand = Conv2d(squeezed_channels, channels, 1)
        self.gate = nn.Hardsigmoid() if hard else nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        gate = self.gate(self.expand(self.activation(self.reduce(x.mean((2, 3), keepdim=True)))))
        return x * gate  # type: ignore[no-any-return]


def round_channels(value: float, *, least: int = 8) -> int:
    """``value`` rounded to a multiple of 8 that is at least ``least`` and at least 90% of ``value``."""
    rounded = max(least, int(value + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * value else rounded


class ClassifierHead(nn.Module):
    """Global average pooling, optional hidden layers with ReLU, and the classifier.

    With ``spatial``, the side of the feature, it is flattened instead of averaged.
    """

    def __init__(
        self, channels: int, num_classes: int, *, hidden: tuple[int, ...] = (), spatial: int | None = None
    ) -> None:
        super().__init__()
        self.pooled = spatial is None
        width = channels if spatial is None else channels * spatial * spatial
        self.hidden = nn.ModuleList()
        for hidden_width in hidden:
            self.hidden.append(Linear(width, hidden_width))
            width = hidden_width
        self.classifier = Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K)."""
        x = x.mean((2, 3)) if self.pooled else x.flatten(1)
        for layer in self.hidden:
            x = torch.relu(layer(x))
        return self.classifier(x)  # type: ignore[no-any-return]


def heads_for(channels: int, head_channels: int) -> int:
    """The largest number of heads of at least ``head_channels`` channels each that divides ``channels``."""
    most = max(channels // head_channels, 1)
    return max(heads for heads in range(1, most + 1) if channels % heads == 0)


class SelfAttention(nn.Module):
    """Multi-head self-attention with one packed projection for queries, keys and values.

    Raises:
        InvalidOptionError: ``num_heads`` does not divide ``channels``.
    """

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        if channels % num_heads:
            raise InvalidOptionError(f"{channels} channels cannot be divided among {num_heads} attention heads")
        self.num_heads = num_heads
        self.qkv = TokenLinear(channels, 3 * channels)
        self.proj = TokenLinear(channels, channels)

    def forward(self, x: Tensor, *, logit_bias: Tensor | None = None) -> Tensor:
        """(B, T, C) -> (B, T, C); ``logit_bias`` (heads, T, T) or (B, heads, T, T) is added to the logits."""
        # (B, T, 3C) -> (B, T, 3, heads, D) -> (3, B, heads, T, D)
        query, key, value = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if logit_bias is None:
            attended = F.scaled_dot_product_attention(query, key, value)
        else:
            logits = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5 + logit_bias  # (B, heads, T, T)
            attended = logits.softmax(-1) @ value
        return self.proj(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class TokenMlp(nn.Module):
    """Two linear layers with a GELU and ``hidden`` channels in between, over the last axis."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = TokenLinear(channels, hidden)
        self.activation = nn.GELU()
        self.fc2 = TokenLinear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return self.fc2(self.activation(self.fc1(x)))  # type: ignore[no-any-return]


class EncoderBlock(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, channels: int, *, num_heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attention = SelfAttention(channels, num_heads)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = TokenMlp(channels, mlp_ratio * channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]
