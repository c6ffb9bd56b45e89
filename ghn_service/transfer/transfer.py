"""From a trained network and a target's structure to the target's weights: the public functions of this package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from ghn_service.transfer.source import Source

Head = Literal["auto", "keep", "reset"]
"""The class layer: ``keep`` insists that classes are equally many, ``auto`` keeps it if they are, ``reset`` never."""

Origin = Literal["exact", "grown", "cut", "none"]
"""How a tensor comes from the source: unchanged; larger, with the same function; smaller or otherwise changed; not."""


@dataclass(frozen=True)
class TransferPlan:
    """What a transfer would do, from structures alone.

    Attributes:
        origins: By target tensor (parameters and BatchNorm statistics, named as in the target's structure).
        sources: The source's tensor for each target tensor that has one; "" where values follow from the architecture
            (an inserted layer that passes its input on).
        similarity: Share of the target's weights that the alignment explains, times that of the source's; 0..1.
        is_exact: Whether the target will compute what the source computes.
        cut_groups: Channel groups that are narrower than the source's, by the layers that produce them.
        left_out: Layers of the source that the target has no place for.
        reasons: Why a target tensor is not mapped, for every ``none``.
        warnings: Why the transfer is not exact, and what else belongs to the function (eps of norms); sentences.
    """

    origins: Mapping[str, Origin]
    sources: Mapping[str, str]
    similarity: float
    is_exact: bool
    cut_groups: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Transfer:
    """Weights for a target; tensors with the origin ``none`` are absent, for the hypernetwork to fill.

    Attributes:
        tensors: Parameters by their names in the target's structure; unchanged ones share memory with the source.
        statistics: Running means and variances of BatchNorm, which belong to the source's function.
        origins: ``exact``, ``grown`` or ``cut`` for each of both.
        plan: What was planned.
        warnings: What the user should know; sentences.
    """

    tensors: Mapping[str, torch.Tensor]
    statistics: Mapping[str, torch.Tensor]
    origins: Mapping[str, Origin]
    plan: TransferPlan
    warnings: tuple[str, ...] = ()

    @property
    def is_exact(self) -> bool:
        """Whether the target now computes what the source computes; then it must not be recalibrated."""
        return self.plan.is_exact

    @property
    def cut_groups(self) -> tuple[str, ...]:
        """Channel groups that are narrower than the source's."""
        return self.plan.cut_groups

    @property
    def left_out(self) -> tuple[str, ...]:
        """Layers of the source that the target has no place for."""
        return self.plan.left_out

    @property
    def similarity(self) -> float:
        """Score of the alignment, 0..1."""
        return self.plan.similarity


def plan_transfer(source: Source, target_structure: bytes, *, head: Head = "auto") -> TransferPlan:
    """What ``transfer_weights`` would do, without a weight being read.

    Args:
        source: The trained network; of its tensors only names and shapes matter.
        target_structure: A serialised ``onnx.ModelProto``, with or without weights.
        head: What happens to the class layer.

    Raises:
        InvalidArchitectureError, UnsupportedArchitectureError, LimitExceededError: As ``read_onnx``, for either.
        SourceError: The source has no weights, or nothing in common with the target.
    """
    raise NotImplementedError


def transfer_weights(
    source: Source, target_structure: bytes, plan: TransferPlan | None = None, *, head: Head = "auto", seed: int = 0
) -> Transfer:
    """The target's weights as far as the source has them.

    Args:
        source: The trained network.
        target_structure: A serialised ``onnx.ModelProto``, with or without weights.
        plan: What ``plan_transfer`` said for the same arguments; made anew if None.
        head: What happens to the class layer.
        seed: Decides which channels are copied first among equals, and the shares of copies.

    Raises:
        As ``plan_transfer``.
    """
    raise NotImplementedError
