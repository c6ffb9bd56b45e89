"""Axes of tensors as terms over channel groups, solved by unification.

An axis is a ``Dim``. A dim is a leaf, or a product of dims (row-major, what a reshape makes), or a concatenation of
dims. Operators state that two axes are the same channels, and ``unify`` makes them so, splitting leaves where one side
has more structure: union-find (channel groups) with terms. After all operators have spoken, every leaf is one group of
channels that must be mapped alike wherever it occurs. What cannot be unified is pinned: a pinned group has the same
channels in source and target, or is not mapped at all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

from ghn_service.transfer.work import nested, spend

MAX_PARTS = 4096
_MAX_SIZE = 2**63 - 1
_COST_OF_DIM = 8
Flag = Literal["position", "pinned", "even", "dotted", "rows"]
"""What is known of a leaf.

``position``: its entries are pixels, tokens or examples instead of channels; ``pinned``: only equal channels may be
mapped; ``even``: a mean is taken over it, so that all channels need equally many copies; ``dotted``: two activations
are multiplied and summed over it (queries and keys); ``rows``: it counts rows of a table that are looked up by index.
"""


class Dim:
    """One axis, or a part of one.

    Attributes:
        size: Number of entries.
        flags: What is known of it; of a product or concatenation, its leaves have them.
        parent: What it was unified with, if anything.
        kind: ``leaf``, ``product`` or ``concat``.
        parts: Of a product or concatenation, in order.

    Raises:
        ValueError: No tensor has an axis of this size.
    """

    __slots__ = ("flags", "kind", "parent", "parts", "size")

    def __init__(self, size: int, *flags: Flag) -> None:
        if not 0 <= size <= _MAX_SIZE:
            raise ValueError(f"an axis has 0 to {_MAX_SIZE} entries")
        self.size = size
        self.flags: set[Flag] = set(flags)
        self.parent: Dim | None = None
        self.kind: Literal["leaf", "product", "concat"] = "leaf"
        self.parts: tuple[Dim, ...] = ()

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
        return self._opened("product")

    def leaves(self) -> list[Dim]:
        """All leaves of more than one entry, of its concatenations too."""
        return self._opened("product", "concat")

    def _opened(self, *kinds: str) -> list[Dim]:
        found: list[Dim] = []
        waiting = [self]
        spend()
        while waiting:
            dim = waiting.pop().root()
            if dim.kind in kinds:
                spend(len(dim.parts))
                waiting.extend(reversed(dim.parts))
            elif dim.size != 1:
                found.append(dim)
        return found

    def mark(self, flag: Flag) -> None:
        """Sets a flag on all leaves."""
        for leaf in self.leaves():
            leaf.flags.add(flag)

    def has(self, flag: Flag) -> bool:
        """Whether a leaf has a flag."""
        return any(flag in leaf.flags for leaf in self.leaves())

    @property
    def is_positions(self) -> bool:
        """Whether there are no channels in it."""
        return all("position" in leaf.flags for leaf in self.leaves())


def nesting(dim: Dim) -> int:
    """How deep parts of an axis lie in each other; 0 for a leaf."""
    deepest, waiting = 0, [(dim, 0)]
    while waiting:
        part, depth = waiting.pop()
        root = part.root()
        deepest = max(deepest, depth)
        spend(1 + len(root.parts))
        waiting.extend((inner, depth + 1) for inner in root.parts)
    return deepest


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
    if len(dims) == 1:
        return dims[0]
    roots = [dim.root() for dim in dims]
    result = Dim(sum(root.size for root in roots))
    if sum(len(root.parts) if root.kind == "concat" else 1 for root in roots) <= MAX_PARTS:
        parts = (root.parts if root.kind == "concat" else (root,) for root in roots)
        result.kind, result.parts = "concat", tuple(itertools.chain.from_iterable(parts))
        spend(len(result.parts))
    else:
        result.flags.add("pinned")
    return result


def split_product(dim: Dim, first: int) -> tuple[Dim, Dim] | None:
    """A leaf as ``first`` x the rest; None where it has no such structure."""
    dim = dim.root()
    if dim.size % first or dim.kind == "product":
        return None
    if dim.kind == "leaf":
        pair = (Dim(first, *dim.flags), Dim(dim.size // first, *dim.flags))
    elif dim.is_positions:
        pair = (Dim(first, "position"), Dim(dim.size // first, "position"))
    else:  # equal parts under one index: query, key and value share their channels
        parts = dim.parts
        if len(parts) != first or len({part.size for part in parts}) != 1:
            return None
        if not all(unify(parts[0], part) for part in parts[1:]):
            return None
        pair = (Dim(first, "pinned"), parts[0])
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
        spend(_COST_OF_DIM * len(sizes))
        dim.kind, dim.parts = "concat", tuple(Dim(size, *dim.flags) for size in sizes)
        return dim.parts
    spend(len(dim.parts) + len(sizes))
    waiting, found, fresh = list(reversed(dim.parts)), list[Dim](), list[Dim]()
    for size in sizes:
        got: list[Dim] = []
        while size:
            part = waiting.pop() if waiting else None
            if part is not None and part.size > size:
                halves = split_sum(part, (size, part.size - size))
                part = None if halves is None else halves[0]
                waiting.extend(halves[1:] if halves is not None else ())
            if part is None:
                return None
            got.append(part)
            size -= part.size
        found.append(concatenation(got))
        fresh.extend(got)
    dim.parts = tuple(fresh)
    return tuple(found)


def unify(a: Dim, b: Dim) -> bool:
    """Makes two axes the same channels; what conflicts is pinned, and the answer is False."""
    spend()
    if a.root() is b.root():
        return True
    with nested():
        is_done = a.size == b.size and _unify_factors(a.factors(), b.factors())
    if not is_done:
        a.mark("pinned")
        b.mark("pinned")
    return is_done


def _unify_factors(left: list[Dim], right: list[Dim]) -> bool:
    left, right = left[::-1], right[::-1]
    while left and right:
        a, b = left.pop().root(), right.pop().root()
        if a.kind == "product" or b.kind == "product":  # a split elsewhere has given a waiting factor parts
            left.extend(reversed(a.factors()))
            right.extend(reversed(b.factors()))
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
        ends = sorted({end for dim in (a, b) for end in itertools.accumulate(part.size for part in dim.parts)})
        sizes = [end - start for start, end in itertools.pairwise([0, *ends])]
        one, other = split_sum(a, sizes), split_sum(b, sizes)
        if one is None or other is None:
            return False
        results = [unify(x, y) for x, y in zip(one, other, strict=True)]
        return all(results)
    if a.kind == "concat":
        a, b = b, a
    if b.kind == "concat" and any(leaf is a for leaf in b.leaves()):
        return False  # a group cannot be a part of itself
    for flag in a.flags:
        b.mark(flag)
    a.parent = b
    return True


def reshaped(axes: Sequence[Dim], sizes: Sequence[int]) -> list[Dim]:
    """The axes after a row-major reshape to ``sizes``; where they cross groups, new pinned ones."""
    waiting = [factor for axis in reversed(axes) for factor in reversed(axis.factors())]
    result: list[Dim] = []
    for size in sizes:
        got: list[Dim] = []
        while size > 1:
            factor = waiting.pop().root() if waiting else None
            if factor is not None and factor.kind == "product":  # a split elsewhere has given it parts
                waiting.extend(reversed(factor.factors()))
                continue
            if factor is not None and factor.size > size:
                pair = split_product(factor, size)
                factor = None if pair is None else pair[0]
                waiting.extend(pair[1:] if pair is not None else ())
            if factor is None or size % factor.size:
                return _crossed(axes, sizes)
            got.append(factor)
            size //= factor.size
        result.append(product(got) if got else Dim(1))
    return result if not waiting else _crossed(axes, sizes)


def _crossed(axes: Sequence[Dim], sizes: Sequence[int]) -> list[Dim]:
    flags: list[Flag] = ["position", "pinned"] if all(axis.is_positions for axis in axes) else ["pinned"]
    for axis in axes:
        axis.mark("pinned")
    return [Dim(size, *flags) for size in sizes]
