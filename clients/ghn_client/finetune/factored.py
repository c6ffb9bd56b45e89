"""Layers whose weight is a product of two thin matrices, ``W = U V``, and the Frobenius decay that trains them well.

    FactoredLinear   x -> U (V x) + b           V: (R, in)            U: (out, R)
    FactoredConv2d   x -> 1x1 conv of k x k conv  V: (R, in / groups, k, k)  U: (out, R, 1, 1)

Frobenius decay penalises ``||U V||_F^2``, the norm of the product, instead of those of the factors
(Khodak, Tenenholtz, Mackey and Fusi, "Initialization and Regularization of Factorized Neural Layers", ICLR 2021).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from ghn_client.errors import InvalidOptionError


class FactoredLinear(nn.Module):
    """A linear layer through a bottleneck of ``rank`` numbers.

    Args:
        in_features: Inputs.
        out_features: Outputs.
        rank: Width R of the bottleneck, at most the smaller of the two.
        bias: Whether the output has a bias.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, *, bias: bool = True) -> None:
        super().__init__()
        _check_rank(rank, min(in_features, out_features))
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.v = nn.Linear(in_features, rank, bias=False)
        self.u = nn.Linear(rank, out_features, bias=bias)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(..., in_features) to (..., out_features)."""
        output: torch.Tensor = self.u(self.v(inputs))
        return output

    def dense_weight(self) -> torch.Tensor:
        """The product, (out_features, in_features)."""
        return self.u.weight @ self.v.weight


class FactoredConv2d(nn.Module):
    """A k x k convolution to ``rank`` channels and a 1 x 1 convolution out of them.

    Args:
        in_channels: Input channels.
        out_channels: Output channels.
        kernel_size: Height and width of the kernel.
        rank: Channels in between.
        stride: As in ``Conv2d``; belongs to the first factor, like padding and dilation.
        padding: Zero padding.
        dilation: Dilation.
        bias: Whether the output has a bias.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        rank: int,
        *,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.v = nn.Conv2d(in_channels, max(rank, 1), kernel_size, stride, padding, dilation, bias=False)
        _check_rank(rank, min(self.v.weight[0].numel(), out_channels))
        self.u = nn.Conv2d(rank, out_channels, 1, bias=bias)
        self.in_channels, self.out_channels, self.rank = in_channels, out_channels, rank

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, H, W) to (B, out_channels, H', W')."""
        output: torch.Tensor = self.u(self.v(inputs))
        return output

    def dense_weight(self) -> torch.Tensor:
        """The product, (out_channels, in_channels, k, k)."""
        return torch.einsum("or,rikl->oikl", self.u.weight[:, :, 0, 0], self.v.weight)


def is_factored(module: nn.Module) -> bool:
    """True for a pair of bias-free inner ``v`` and outer ``u`` matrix layers, of this library or another."""
    u, v = getattr(module, "u", None), getattr(module, "v", None)
    return isinstance(u, (nn.Linear, nn.Conv2d)) and isinstance(v, (nn.Linear, nn.Conv2d)) and v.bias is None


def factored_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All factored pairs of ``module`` with their dotted paths."""
    return ((name, child) for name, child in module.named_modules() if is_factored(child))


def factored_weights(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Dotted paths of the factors U and V of weights that are products through torch's parametrizations."""
    for name, child in module.named_modules():
        factors = dict(child.named_parameters(recurse=False)) if isinstance(child, ParametrizationList) else {}
        u, v = factors.get("original0"), factors.get("original1")
        if u is not None and v is not None and u.dim() == v.dim() == 2 and u.shape[1] == v.shape[0]:
            yield f"{name}.original0", f"{name}.original1"


def factor_parameters(module: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """U and V of every factored layer and weight of ``module``."""
    pairs = [(pair.get_parameter("u.weight"), pair.get_parameter("v.weight")) for _, pair in factored_modules(module)]
    return pairs + [(module.get_parameter(u), module.get_parameter(v)) for u, v in factored_weights(module)]


def frobenius_norm_squared(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """``||U V||_F^2 = tr((U^T U)(V V^T))``, without forming the product: O(R^2 (in + out)).

    Args:
        u: (out, R, ...), flattened behind R.
        v: (R, in, ...), flattened behind R.
    """
    u, v = u.flatten(1), v.flatten(1)
    return ((u.T @ u) * (v @ v.T)).sum()


def frobenius_decay(module: nn.Module) -> torch.Tensor:
    """Half the sum of ``||U V||_F^2`` over all factored layers and weights of ``module``."""
    terms = [frobenius_norm_squared(u, v) for u, v in factor_parameters(module)]
    return 0.5 * torch.stack(terms).sum() if terms else torch.zeros(())


def _check_rank(rank: int, full: int) -> None:
    if not 1 <= rank <= full:
        raise InvalidOptionError(f"rank must be from 1 to {full} (full rank), got {rank}")
