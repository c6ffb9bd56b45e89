"""The pair of factors that stands in for one weight in a low-rank prediction, and how pairs are named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ghn_client.errors import InvalidOptionError

FACTOR_IN = ".factor_in"
FACTOR_OUT = ".factor_out"


@dataclass(frozen=True, slots=True, eq=False)
class FactorPair:
    """The two factors of one weight, in torch's layout.

    Attributes:
        factor_in: (r, in, kernel...), applied first.
        factor_out: (out, r, 1...), applied to its output.
    """

    factor_in: torch.Tensor
    factor_out: torch.Tensor

    def __post_init__(self) -> None:
        shapes = tuple(self.factor_out.shape), tuple(self.factor_in.shape)
        if min(self.factor_in.dim(), self.factor_out.dim()) < 2 or shapes[0][1] != shapes[1][0]:
            raise InvalidOptionError(
                f"expected factors (out, r, ...) and (r, in, ...), got {shapes[0]} and {shapes[1]}"
            )

    @property
    def rank(self) -> int:
        """R: the channels in between."""
        return self.factor_in.shape[0]

    def dense(self) -> torch.Tensor:
        """The product (out, in, kernel...)."""
        product = self.factor_out.flatten(1) @ self.factor_in.flatten(1)
        return product.reshape(self.factor_out.shape[0], *self.factor_in.shape[1:])

    def dense_in_layout(self, permutation: Sequence[int]) -> torch.Tensor:
        """The product as a file stores it that keeps torch's axis i as its axis ``permutation[i]``; () for torch's."""
        axes = [list(permutation).index(axis) for axis in range(len(permutation))]
        return self.dense().permute(axes) if axes else self.dense()


def factor_pairs(tensors: Mapping[str, torch.Tensor]) -> dict[str, FactorPair]:
    """The factor pairs among named tensors, by name of the weight that each stands in for.

    Raises:
        InvalidOptionError: One factor is there without the other.
    """
    pairs = {}
    for name, tensor in tensors.items():
        if not name.endswith(FACTOR_IN):
            continue
        weight = name.removesuffix(FACTOR_IN)
        if weight + FACTOR_OUT not in tensors:
            raise InvalidOptionError(f"expected {weight + FACTOR_OUT!r} beside {name!r}; the set is incomplete")
        pairs[weight] = FactorPair(tensor, tensors[weight + FACTOR_OUT])
    return pairs
