"""Which channel group of the source each group of the target stands for, told by pairs of tensors, axis by axis."""

from __future__ import annotations

from dataclasses import dataclass, field

from ghn_service.transfer.axes import Dim

UNIT = Dim(1)
"""What a group stands for that the source has only once, such as the heads of a network with one head."""
FREE = Dim(0)
"""What a group stands for that the source does not have; nothing of the source reads it."""


@dataclass(eq=False, slots=True)
class Relations:
    """Which group of the source each group of the target stands for.

    Attributes:
        of: Source group by target group.
        lost: Source groups that have no place in the target's concatenation.
        gains: What channels of a target group are multiplied with when they are written, and divided by when read.
        factors: What single tensors are multiplied with, by name.
    """

    of: dict[Dim, Dim] = field(default_factory=dict)
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
            if a.kind != b.kind:
                return False
            if a.kind == "leaf":
                are_positions = a.is_positions and b.is_positions
                done &= (a.size == b.size or len(mine) == 1) if are_positions else self.bind(a, b)
            elif len(a.parts) == len(b.parts):
                for x, y in zip(a.parts, b.parts, strict=True):
                    done &= self.relate(x, y, late=late)
            else:
                done &= late and self._match_parts(a, b)
        return done

    def bind(self, target: Dim, source: Dim) -> bool:
        """Relates two groups; False where the target's stands for another."""
        return self.of.setdefault(target, source) is source

    def kind(self, target: Dim) -> str:
        """What becomes of a group: ``equal``, ``grown``, ``cut``, ``free`` or ``blocked``; "" if it stands for none."""
        source = self.of.get(target)
        if source is None:
            return ""
        if source is FREE:
            return "free"
        if target.size == source.size:
            return "equal"
        if "pinned" in target.flags | source.flags:
            return "blocked"
        return "grown" if target.size > source.size else "cut"

    def stands_for(self, target: Dim, source: Dim) -> bool:
        """Whether an axis stands for another, group by group."""
        return [self.of.get(leaf) for leaf in target.leaves()] == source.leaves()

    def is_free(self, target: Dim) -> bool:
        """Whether the source has no group of an axis."""
        leaves = target.leaves()
        return bool(leaves) and all(self.of.get(leaf) is FREE for leaf in leaves)

    def _relate_shorter(self, mine: list[Dim], theirs: list[Dim]) -> bool:
        """An axis that has one factor more in the target, because the source has only one of it (one head)."""
        if len(mine) != len(theirs) + 1 or not theirs:
            return False
        for skipped in range(len(mine)):
            pairs = list(zip(mine[:skipped] + mine[skipped + 1 :], theirs, strict=True))
            if all(a.kind == b.kind == "leaf" and (a.size == b.size or self.of.get(a) is b) for a, b in pairs):
                return all([*(self.bind(a, b) for a, b in pairs), self.bind(mine[skipped], UNIT)])
        return False

    def _match_parts(self, a: Dim, b: Dim) -> bool:
        done = True
        waiting = [part.root() for part in b.parts]
        for part in (item.root() for item in a.parts):
            place = next((i for i, other in enumerate(waiting) if self.stands_for(part, other)), None)
            if place is None:
                for leaf in part.leaves():
                    done &= self.bind(leaf, FREE)
            else:
                self.lost.update(leaf for other in waiting[:place] for leaf in other.leaves())
                del waiting[: place + 1]
        self.lost.update(leaf for other in waiting for leaf in other.leaves())
        return done
