"""Axes of tensors as terms over channel groups, solved by unification.

An axis is a ``Dim``. A dim is a leaf, or a product of dims (row-major, what a reshape makes), or a concatenation of
dims. Operators state that two axes are the same channels, and ``unify`` makes them so, splitting leaves where one side
has more structure: union-find (channel groups) with terms. After all operators have spoken, every leaf is one group of
channels that must be mapped alike wherever it occurs. What cannot be unified is pinned: a pinned group has the same
channels in source and target, or is not mapped at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

MAX_PARTS = 4096
Flag = Literal["pinned", "even", "dotted", "position", "rows"]
_FLAGS: tuple[Flag, ...] = ("pinned", "even", "dotted", "position", "rows")


class Dim:
    """One axis, or a part of one.

    Attributes:
        size: Number of entries.
        parent: What it was unified with, if anything.
        kind: ``leaf``, ``product`` or ``concat``.
        parts: Of a product or concatenation, in order.
        is_position: Whether its entries are pixels, tokens or examples instead of channels.
        is_pinned: Whether only equal channels may be mapped.
        is_even: Whether a mean is taken over it, so that all channels need equally many copies.
        is_dotted: Whether two activations are multiplied and summed over it (queries and keys).
        is_rows: Whether it counts the rows of a table that is looked up by index.
    """

    __slots__ = ("is_dotted", "is_even", "is_pinned", "is_position", "is_rows", "kind", "parent", "parts", "size")

    def __init__(self, size: int, *, position: bool = False, pinned: bool = False) -> None:
        self.size = size
        self.parent: Dim | None = None
        self.kind: Literal["leaf", "product", "concat"] = "leaf"
        self.parts: tuple[Dim, ...] = ()
        self.is_position, self.is_pinned = position, pinned
        self.is_even = self.is_dotted = self.is_rows = False

    def root(self) -> Dim:
        """The dim that stands for all that were unified with this one."""
        dim = self
        while dim.parent is not None:
            if dim.parent.parent is not None:
                dim.parent = dim.parent.parent
            dim = dim.parent
        return dim

    def factors(self) -> list[Dim]:
        """Its factors of more than one entry: leaves and concatenations."""
        found: list[Dim] = []
        waiting = [self]
        while waiting:
            dim = waiting.pop().root()
            if dim.kind == "product":
                waiting.extend(reversed(dim.parts))
            elif dim.size != 1:
                found.append(dim)
        return found

    def leaves(self) -> list[Dim]:
        """All leaves of more than one entry, of its concatenations too."""
        found: list[Dim] = []
        waiting = [self]
        while waiting:
            dim = waiting.pop().root()
            if dim.kind != "leaf":
                waiting.extend(reversed(dim.parts))
            elif dim.size != 1:
                found.append(dim)
        return found

    def mark(self, flag: Flag) -> None:
        """Sets a flag on all leaves."""
        for leaf in self.leaves():
            setattr(leaf, f"is_{flag}", True)


def product(dims: Sequence[Dim]) -> Dim:
    """The row-major product of dims."""
    wide = [dim for dim in dims if dim.size != 1]
    if len(wide) == 1:
        return wide[0]
    result = Dim(math.prod(dim.size for dim in dims))
    if wide:
        result.kind, result.parts = "product", tuple(wide)
    return result


def concatenation(dims: Sequence[Dim]) -> Dim:
    """Dims one behind the other; concatenations in it are opened."""
    parts: list[Dim] = []
    for dim in dims:
        root = dim.root()
        parts.extend(root.parts if root.kind == "concat" else [root])
    if len(parts) == 1:
        return parts[0]
    result = Dim(sum(part.size for part in parts))
    if all(any(leaf.is_position for leaf in part.leaves()) or part.size == 1 for part in parts):
        result.is_position = all(part.size == 1 for part in parts)
    if len(parts) <= MAX_PARTS:
        result.kind, result.parts = "concat", tuple(parts)
    else:
        result.is_pinned = True
    return result


def split_product(dim: Dim, first: int) -> tuple[Dim, Dim] | None:
    """A leaf as ``first`` x the rest; None where it has no such structure."""
    dim = dim.root()
    if dim.size % first:
        return None
    if dim.kind == "concat" and all(leaf.is_position for leaf in dim.leaves()):
        pair = (Dim(first, position=True), Dim(dim.size // first, position=True))
    elif dim.kind == "concat":  # equal parts under one index: query, key and value share their channels
        parts = dim.parts
        if len(parts) != first or len({part.size for part in parts}) != 1:
            return None
        for part in parts[1:]:
            if not unify(parts[0], part):
                return None
        pair = (Dim(first, pinned=True), parts[0])
    elif dim.kind == "leaf":
        pair = (_like(dim, first), _like(dim, dim.size // first))
    else:
        return None
    dim.kind, dim.parts = "product", pair
    return pair


def split_sum(dim: Dim, sizes: Sequence[int]) -> tuple[Dim, ...] | None:
    """A leaf or concatenation cut into consecutive pieces of these sizes; None where it has no such structure."""
    dim = dim.root()
    if dim.kind == "product":
        factors = dim.factors()  # (a, b, ...) cut along a, in whole rows of b x ...
        row = dim.size // factors[0].size
        if any(size % row for size in sizes):
            return None
        pieces = split_sum(factors[0], [size // row for size in sizes])
        return None if pieces is None else tuple(product([piece, *factors[1:]]) for piece in pieces)
    if dim.kind == "leaf":
        if len(sizes) == 1:
            return (dim,)
        dim.kind, dim.parts = "concat", tuple(_like(dim, size) for size in sizes)
        return dim.parts
    waiting, found, fresh = list(reversed(dim.parts)), list[Dim](), list[Dim]()
    for size in sizes:
        got: list[Dim] = []
        while size:
            part = waiting.pop() if waiting else None
            if part is None:
                return None
            if part.size > size:
                halves = split_sum(part, (size, part.size - size))
                if halves is None:
                    return None
                part = halves[0]
                waiting.append(halves[1])
            got.append(part)
            size -= part.size
        found.append(concatenation(got) if len(got) != 1 else got[0])
        fresh.extend(got)
    dim.parts = tuple(fresh)
    return tuple(found)


def _like(dim: Dim, size: int) -> Dim:
    part = Dim(size, position=dim.is_position, pinned=dim.is_pinned)
    part.is_even, part.is_dotted, part.is_rows = dim.is_even, dim.is_dotted, dim.is_rows
    return part


def unify(a: Dim, b: Dim) -> bool:
    """Makes two axes the same channels; what conflicts is pinned, and the answer is False."""
    if a.root() is b.root():
        return True
    if a.size != b.size or not _unify_factors(a.factors(), b.factors()):
        a.mark("pinned")
        b.mark("pinned")
        return False
    return True


def _unify_factors(left: list[Dim], right: list[Dim]) -> bool:
    left, right = left[::-1], right[::-1]
    while left and right:
        a, b = left.pop().root(), right.pop().root()
        for dim, waiting in ((a, left), (b, right)):  # a split elsewhere may have given a waiting factor parts
            if dim.kind == "product":
                waiting.extend(reversed(dim.factors()))
        if a.kind == "product" or b.kind == "product":
            if a.kind != "product":
                left.append(a)
            if b.kind != "product":
                right.append(b)
            continue
        if a.size == b.size:
            if not _unify_equal(a, b):
                return False
            continue
        big, small, waiting = (a, b, left) if a.size > b.size else (b, a, right)
        pair = split_product(big, small.size)
        if pair is None:
            return False
        waiting.append(pair[1])
        if not _unify_equal(pair[0].root(), small):
            return False
    return not left and not right


def _unify_equal(a: Dim, b: Dim) -> bool:
    """Unifies two factors of one size: leaves, or concatenations."""
    if a is b:
        return True
    if a.kind == "product" or b.kind == "product":
        return _unify_factors(a.factors(), b.factors())
    if a.kind == "concat" and b.kind == "concat":
        bounds = sorted({*_bounds(a.parts), *_bounds(b.parts)})
        sizes = [end - start for start, end in zip([0, *bounds], bounds, strict=False)]
        one, other = split_sum(a, sizes), split_sum(b, sizes)
        if one is None or other is None:
            return False
        results = [unify(x, y) for x, y in zip(one, other, strict=True)]
        return all(results)
    if a.kind == "concat":
        a, b = b, a
    if b.kind == "concat" and any(leaf is a for leaf in b.leaves()):
        return False  # a group cannot be a part of itself
    for flag in _FLAGS:
        if getattr(a, f"is_{flag}"):
            b.mark(flag)
    a.parent = b
    return True


def _bounds(parts: Iterable[Dim]) -> list[int]:
    ends, end = [], 0
    for part in parts:
        end += part.size
        ends.append(end)
    return ends


def reshaped(axes: Sequence[Dim], sizes: Sequence[int]) -> list[Dim]:
    """The axes after a row-major reshape to ``sizes``; where they cross groups, new pinned ones."""
    waiting = [factor for axis in reversed(axes) for factor in reversed(axis.factors())]
    result: list[Dim] = []
    for size in sizes:
        got: list[Dim] = []
        while size > 1:
            if not waiting:
                return _crossed(axes, sizes)
            factor = waiting.pop().root()
            if factor.kind == "product":
                waiting.extend(reversed(factor.factors()))
                continue
            if factor.size > size:
                pair = split_product(factor, size)
                if pair is None:
                    return _crossed(axes, sizes)
                factor = pair[0]
                waiting.append(pair[1])
            if size % factor.size:
                return _crossed(axes, sizes)
            got.append(factor)
            size //= factor.size
        result.append(product(got) if got else Dim(1))
    return result if not waiting else _crossed(axes, sizes)


def _crossed(axes: Sequence[Dim], sizes: Sequence[int]) -> list[Dim]:
    is_position = all(leaf.is_position for axis in axes for leaf in axis.leaves())
    for axis in axes:
        axis.mark("pinned")
    return [Dim(size, position=is_position, pinned=True) for size in sizes]
