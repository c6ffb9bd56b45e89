"""One channel map per group: which channel of the source stands in each channel of the target.

Groups of the target are related to groups of the source through pairs of tensors, axis by axis. A related group is
equal (identity), wider (all channels, then copies; what reads copies gets shares that add to one, as in Net2Net,
arXiv:1511.05641, with unequal shares, as in LEMON, arXiv:2310.07999), or narrower (the most important channels).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from ghn_service.transfer.axes import Dim
from ghn_service.transfer.network import Layer, Tensor

UNIT = Dim(1)
"""What a group stands for that the source has only once, such as the heads of a network with one head."""
FREE = Dim(0)
"""What a group stands for that the source does not have; nothing of the source reads it."""


@dataclass(eq=False, slots=True)
class Relations:
    """Which group of the source each group of the target stands for.

    Attributes:
        of: Source group by target group.
        conflicts: Target groups that two tensors relate to different groups.
        lost: Source groups that have no place in the target's concatenation.
        gains: What channels of a target group are multiplied with when they are written, and divided by when read.
        factors: What single tensors are multiplied with, by name.
    """

    of: dict[Dim, Dim] = field(default_factory=dict)
    conflicts: set[Dim] = field(default_factory=set)
    lost: set[Dim] = field(default_factory=set)
    gains: dict[Dim, float] = field(default_factory=dict)
    factors: dict[str, float] = field(default_factory=dict)

    def relate(self, target: Dim, source: Dim, *, late: bool = False) -> bool:
        """Relates two axes; False where their structures differ or another relation stands against it.

        With ``late``, concatenations of different lengths are matched by the groups that are known already, and
        groups that only the target has are free.
        """
        mine, theirs = target.factors(), source.factors()
        if len(mine) != len(theirs):
            return self._relate_shorter(mine, theirs)
        done = True
        for a, b in zip(mine, theirs, strict=True):
            if a.kind == "concat" and b.kind == "concat":
                if len(a.parts) == len(b.parts):
                    for x, y in zip(a.parts, b.parts, strict=True):
                        done &= self.relate(x, y, late=late)
                elif late:
                    self._match_parts(a, b)
                else:
                    done = False
            elif a.kind == "concat" or b.kind == "concat":
                return False
            elif ("position" in a.flags) and ("position" in b.flags):
                done &= a.size == b.size or len(mine) == 1
            else:
                done &= self._bind(a, b)
        return done

    def _bind(self, a: Dim, b: Dim) -> bool:
        known = self.of.setdefault(a, b)
        if known is not b:
            self.conflicts.add(a)
        return known is b

    def _relate_shorter(self, mine: list[Dim], theirs: list[Dim]) -> bool:
        """An axis that has one factor more in the target, because the source has only one of it (one head)."""
        if len(mine) != len(theirs) + 1 or not theirs:
            return False
        for skipped in range(len(mine)):
            rest = mine[:skipped] + mine[skipped + 1 :]
            pairs = list(zip(rest, theirs, strict=True))
            if all(a.kind == b.kind == "leaf" and (a.size == b.size or self.of.get(a) is b) for a, b in pairs):
                return all([*(self._bind(a, b) for a, b in pairs), self._bind(mine[skipped], UNIT)])
        return False

    def _match_parts(self, a: Dim, b: Dim) -> None:
        waiting = [part.root() for part in b.parts]
        for part in (item.root() for item in a.parts):
            place = next((i for i, other in enumerate(waiting) if self._stands_for(part, other)), None)
            if place is None:
                for leaf in part.leaves():
                    self.of.setdefault(leaf, FREE)
            else:
                self.lost.update(leaf for other in waiting[:place] for leaf in other.leaves())
                del waiting[: place + 1]
        self.lost.update(leaf for other in waiting for leaf in other.leaves())

    def _stands_for(self, part: Dim, other: Dim) -> bool:
        mine, theirs = part.leaves(), other.leaves()
        return len(mine) == len(theirs) and all(self.of.get(x) is y for x, y in zip(mine, theirs, strict=True))


def kind_of_map(target: Dim, source: Dim) -> str:
    """``equal``, ``grown``, ``cut``, ``free``, or ``blocked`` where a group must not change and does."""
    if source is FREE:
        return "free"
    if target.size == source.size:
        return "equal"
    if ("pinned" in target.flags) or ("pinned" in source.flags):
        return "blocked"
    return "grown" if target.size > source.size else "cut"


@dataclass(frozen=True, slots=True)
class ChannelMap:
    """Source channel of every target channel, and the share of each in a fan-in; index -1 has no source.

    Attributes:
        index: (N,) int64.
        shares: (N,) float64; over the copies of one channel they add to one.
    """

    index: torch.Tensor
    shares: torch.Tensor


def make_map(
    target: Dim, source: Dim, importance: torch.Tensor | None, *, generator: torch.Generator
) -> ChannelMap | None:
    """The map of one group, None for the identity.

    Args:
        target: Group of the target, with N channels.
        source: The source's, with M channels.
        importance: (M,), or None where all are alike.
        generator: Decides shares.
    """
    wanted, given = target.size, source.size
    if source is FREE:
        return ChannelMap(torch.full((wanted,), -1), torch.zeros(wanted, dtype=torch.float64))
    if wanted == given:
        return None
    ranking = torch.arange(given) if importance is None else torch.argsort(importance, descending=True, stable=True)
    if wanted < given:
        index = ranking[:wanted].sort().values
    elif wanted % given == 0:
        index = torch.arange(given).repeat(wanted // given)
    else:
        whole, rest = divmod(wanted, given)
        index = torch.cat([torch.arange(given).repeat(whole), ranking[:rest].sort().values])
    # Shares are multiples of 2^-10, so that they add to one in every precision; unequal, or copies would never part.
    counts = torch.bincount(index, minlength=given)
    raw = torch.rand(wanted, generator=generator, dtype=torch.float64) * 0.5 + 0.75
    totals = torch.zeros(given, dtype=torch.float64).index_add_(0, index, raw)
    shares = torch.round(raw / totals[index] * 1024) / 1024
    first = torch.full((given,), -1).scatter_(0, index.flip(0), torch.arange(wanted).flip(0))
    missing = 1 - torch.zeros(given, dtype=torch.float64).index_add_(0, index, shares)
    present = counts > 0
    shares[first[present]] += missing[present]
    return ChannelMap(index, shares)


def axis_map(axis: Dim, other: Dim, relations: Relations, maps: Mapping[Dim, ChannelMap | None]) -> ChannelMap | None:
    """The map of a whole axis, composed of its groups' maps; None for the identity."""
    mine, theirs = axis.factors(), other.factors()
    if all(maps.get(leaf) is None for leaf in axis.leaves()) and axis.size == other.size:
        return None
    index, shares = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.float64)
    for factor in mine:
        related = theirs.pop(0) if theirs and relations.of.get(factor) is not UNIT else UNIT
        part = _factor_map(factor, related, relations, maps)
        combined = index[:, None] * related.size + part.index[None, :]
        combined[(index[:, None] < 0) | (part.index[None, :] < 0)] = -1
        index, shares = combined.flatten(), (shares[:, None] * part.shares[None, :]).flatten()
    return ChannelMap(index, shares)


def _factor_map(factor: Dim, other: Dim, relations: Relations, maps: Mapping[Dim, ChannelMap | None]) -> ChannelMap:
    if factor.kind == "leaf":
        return maps.get(factor) or ChannelMap(torch.arange(factor.size), torch.ones(factor.size, dtype=torch.float64))
    offsets: list[tuple[Dim, int]] = []
    end = 0
    for part in other.parts:
        offsets.append((part.root(), end))
        end += part.size
    same_length = len(offsets) == len(factor.parts)
    pieces = []
    for position, part in enumerate(item.root() for item in factor.parts):
        leaves = part.leaves()
        if leaves and all(relations.of.get(leaf) is FREE for leaf in leaves):
            pieces.append(make_map(part, FREE, None, generator=torch.Generator()))
            continue
        place = (
            position
            if same_length
            else next(i for i, (item, _) in enumerate(offsets) if relations._stands_for(part, item))
        )
        source, start = offsets[place]
        if not same_length:
            del offsets[: place + 1]
        inner = axis_map(part, source, relations, maps)
        if inner is None:
            inner = ChannelMap(torch.arange(part.size), torch.ones(part.size, dtype=torch.float64))
        pieces.append(ChannelMap(torch.where(inner.index < 0, inner.index, inner.index + start), inner.shares))
    present = [piece for piece in pieces if piece is not None]
    return ChannelMap(torch.cat([piece.index for piece in present]), torch.cat([piece.shares for piece in present]))


# ---- importance -----------------------------------------------------------------------------------------------------


def rank_channels(
    layers: Iterable[Layer], tensors: Mapping[str, torch.Tensor], groups: set[Dim]
) -> dict[Dim, torch.Tensor]:
    """How much each channel of some source groups matters, from the weights alone.

    A channel behind a norm with scale gamma, shift beta and ReLU has E relu(N(beta, gamma^2))^2 = (beta^2 + gamma^2)
    Phi(beta / gamma) + beta gamma phi(beta / gamma); without a norm, the squared norm of its producers' rows stands for
    it. That is summed over all producers, and its root multiplied by the norm of all consumers' columns.

    Returns:
        (M,) float64 for each group of M channels.
    """
    produced: dict[Dim, torch.Tensor] = {}
    normed: dict[Dim, torch.Tensor] = {}
    read: dict[Dim, torch.Tensor] = {}
    seen: set[int] = set()
    for layer in layers:
        for role, tensor in layer.tensors.items():
            if id(tensor) in seen or role in ("mean", "var"):
                continue
            seen.add(id(tensor))
            for axis, dim in enumerate(tensor.axes):
                if groups.isdisjoint(dim.leaves()):
                    continue
                energy = _energy(tensor, tensors, layer, axis)
                if energy is None:
                    continue
                found = read if axis in tensor.contracted else normed if layer.kind == "norm" else produced
                for leaf, values in _per_leaf(dim, energy):
                    if leaf in groups:
                        found[leaf] = found[leaf] + values if leaf in found else values
    result = {}
    for leaf in groups:
        strength = normed.get(leaf, produced.get(leaf))
        columns = read.get(leaf)
        ones = torch.ones(leaf.size, dtype=torch.float64)
        result[leaf] = (ones if strength is None else strength.sqrt()) * (ones if columns is None else columns.sqrt())
    return result


def _energy(tensor: Tensor, tensors: Mapping[str, torch.Tensor], layer: Layer, axis: int) -> torch.Tensor | None:
    value = tensors[tensor.name]
    if layer.kind == "norm":
        weight, bias = layer.tensors.get("weight"), layer.tensors.get("bias")
        if tensor is not weight or bias is None:
            return None
        gamma = tensors[weight.name].double().abs().clamp_min(1e-12)
        beta = tensors[bias.name].double()
        ratio = beta / gamma
        cdf = 0.5 * (1 + torch.erf(ratio / math.sqrt(2)))
        pdf = torch.exp(-0.5 * ratio * ratio) / math.sqrt(2 * math.pi)
        return (beta * beta + gamma * gamma) * cdf + beta * gamma * pdf
    others = [i for i in range(value.ndim) if i != axis]
    norms = torch.linalg.vector_norm(value, dim=others, dtype=torch.float32) if others else value.float().abs()
    return norms.double().square()


def _per_leaf(dim: Dim, values: torch.Tensor) -> Iterable[tuple[Dim, torch.Tensor]]:
    """The sums of an axis's values over everything but one group, for each group of the axis."""
    factors = dim.factors()
    grid = values.reshape([factor.size for factor in factors] or [1])
    for position, factor in enumerate(factors):
        sums = grid.sum(dim=[i for i in range(grid.ndim) if i != position]) if grid.ndim > 1 else grid
        if factor.kind == "leaf":
            yield factor, sums
            continue
        start = 0
        for part in factor.parts:
            yield from _per_leaf(part, sums[start : start + part.size])
            start += part.size
