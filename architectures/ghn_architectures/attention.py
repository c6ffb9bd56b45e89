"""Transformer blocks: multi-head self-attention and a two-layer perceptron, each with its norm and shortcut.

Reference: Vaswani et al. 2017 (arXiv:1706.03762), with the norm before each branch.

Shapes: B examples, T tokens, C channels, D = C / heads.
"""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ghn_architectures.layers import TokenLinear
from ghn_service.errors import InvalidOptionError


def heads_for(channels: int, head_channels: int) -> int:
    """The largest number of heads of at least ``head_channels`` channels each that divides ``channels``."""
    most = max(channels // head_channels, 1)
    return max(heads for heads in range(1, most + 1) if channels % heads == 0)


class SelfAttention(nn.Module):
    """Multi-head self-attention with one packed projection for queries, keys and values.

    Args:
        channels: Channels C, a multiple of ``num_heads``.
        num_heads: Number of heads.

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
    """Two linear layers with a GELU in between, over the last axis.

    Args:
        channels: Channels of input and output.
        hidden: Channels in between.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = TokenLinear(channels, hidden)
        self.activation = nn.GELU()
        self.fc2 = TokenLinear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return self.fc2(self.activation(self.fc1(x)))  # type: ignore[no-any-return]


class EncoderBlock(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``.

    Args:
        channels: Channels C.
        num_heads: Number of heads.
        mlp_ratio: Hidden channels of the perceptron in units of C.
    """

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
