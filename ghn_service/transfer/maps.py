"""One channel map per group: which channel of the source stands in each channel of the target.

A related group is equal (identity), wider (all channels, then copies; what reads copies gets shares that add to one, as
in Net2Net, arXiv:1511.05641, with unequal shares, as in LEMON, arXiv:2310.07999), or narrower (the most important
channels).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ghn_service.transfer.axes import Dim
from ghn_service.transfer.relations import UNIT, Relations


@dataclass(frozen=True, slots=True)
class ChannelMap:
    """Source channel of every target channel, and the share of each in a fan-in; index -1 has no source.

    Attributes:
        index: (N,) int64.
        shares: (N,) float64; over the copies of one channel they add to one.
    """

    index: torch.Tensor
    shares: torch.Tensor

    @staticmethod
    def identity(size: int) -> ChannelMap:
        """The same channels."""
        return ChannelMap(torch.arange(size), torch.ones(size, dtype=torch.float64))

    @staticmethod
    def free(size: int) -> ChannelMap:
        """Channels that no channel of the source stands for."""
        return ChannelMap(torch.full((size,), -1), torch.zeros(size, dtype=torch.float64))


class ChannelMaps:
    """The maps of all groups that change.

    Args:
        relations: What the groups stand for.
        importance: (M,) for each of the source's groups of M channels; all are alike where it is absent.
        generator: Decides shares.
    """

    def __init__(
        self, relations: Relations, importance: Mapping[Dim, torch.Tensor], generator: torch.Generator
    ) -> None:
        self.relations = relations
        self._of = {
            target: ChannelMap.free(target.size)
            if not source.size
            else _make_map(target.size, source.size, importance.get(source), generator)
            for target, source in relations.of.items()
            if target.size != source.size
        }

    def axis(self, axis: Dim, source: Dim) -> ChannelMap | None:
        """The map of a whole axis, composed of its groups' maps; None for the identity."""
        if axis.size == source.size and not any(leaf in self._of for leaf in axis.leaves()):
            return None
        theirs = source.factors()
        index, shares = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.float64)
        for factor in axis.factors():
            other = theirs.pop(0) if theirs and self.relations.of.get(factor) is not UNIT else UNIT
            part = self._factor(factor, other)
            combined = index[:, None] * other.size + part.index[None, :]
            combined[(index[:, None] < 0) | (part.index[None, :] < 0)] = -1
            index, shares = combined.flatten(), (shares[:, None] * part.shares[None, :]).flatten()
        return ChannelMap(index, shares)

    def is_cut(self, axis: Dim) -> bool:
        """Whether an axis is one group of channels, of which the source has more."""
        return axis.factors() == [axis.root()] and self.relations.kind(axis.root()) == "cut"

    def _factor(self, factor: Dim, source: Dim) -> ChannelMap:
        if factor.kind == "leaf":
            return self._of.get(factor) or ChannelMap.identity(factor.size)
        waiting, end = [], 0
        for part in source.parts:
            waiting.append((part.root(), end))
            end += part.size
        is_matched = len(waiting) == len(factor.parts)
        pieces = []
        for part in (item.root() for item in factor.parts):
            if self.relations.is_free(part) and not is_matched:
                pieces.append(ChannelMap.free(part.size))
                continue
            while not is_matched and not self.relations.stands_for(part, waiting[0][0]):
                del waiting[0]
            other, start = waiting.pop(0)
            inner = self.axis(part, other) or ChannelMap.identity(part.size)
            pieces.append(ChannelMap(torch.where(inner.index < 0, inner.index, inner.index + start), inner.shares))
        return ChannelMap(torch.cat([item.index for item in pieces]), torch.cat([item.shares for item in pieces]))


def _make_map(wanted: int, given: int, importance: torch.Tensor | None, generator: torch.Generator) -> ChannelMap:
    """The map of a group of ``wanted`` channels onto ``given`` others."""
    ranking = torch.arange(given) if importance is None else torch.argsort(importance, descending=True, stable=True)
    whole, rest = divmod(wanted, given)
    index = torch.cat([torch.arange(given).repeat(whole), ranking[:rest].sort().values])
    # Shares are multiples of 2^-10, so that they add to one in every precision; unequal, or copies would never part.
    raw = torch.rand(wanted, generator=generator, dtype=torch.float64) * 0.5 + 0.75
    totals = torch.zeros(given, dtype=torch.float64).index_add_(0, index, raw)
    shares = torch.round(raw / totals[index] * 1024) / 1024
    missing = 1 - torch.zeros(given, dtype=torch.float64).index_add_(0, index, shares)
    first = torch.full((given,), -1).scatter_(0, index.flip(0), torch.arange(wanted).flip(0))
    present = first >= 0
    shares[first[present]] += missing[present]
    return ChannelMap(index, shares)
