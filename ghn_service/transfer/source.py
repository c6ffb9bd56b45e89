"""``Source``: a trained network that weights are taken from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class SourceCard:
    """What people should know of a source.

    Attributes:
        dataset: Data that it was trained on, such as ``"cifar10"``; "" if unknown.
        class_names: Names of the classes, in order; may be empty.
        accuracy: Share of test images that it gets right, 0 to 1; None if unknown.
        recipe: How it was trained, in words.
        seed: Seed of the training; None if unknown.
        command: The command that made it, if one did.
        licence: Terms under which its weights may be used; "" if unknown.
        normalization: ``{"mean": (...), "std": (...)}`` of its input's channels; empty if unknown.
        image_size: Pixels per side of its images; 0 if unknown.
        details: Anything else, as values for JSON.
    """

    dataset: str = ""
    class_names: tuple[str, ...] = ()
    accuracy: float | None = None
    recipe: str = ""
    seed: int | None = None
    command: str = ""
    licence: str = ""
    normalization: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    image_size: int = 0
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, slots=True)
class Source:
    """A trained network.

    Attributes:
        name: What it is called; for people, and in the origins of transferred tensors.
        structure: Its ONNX model without weights.
        tensors: Weights and running statistics, by the name of the initializer, in the layout of ``structure``.
        card: What people should know.
        digest: sha256 of what it holds, in hexadecimal; "" where nobody asked for it.
    """

    name: str
    structure: bytes
    tensors: Mapping[str, torch.Tensor]
    card: SourceCard = field(default_factory=SourceCard)
    digest: str = ""

    @property
    def num_parameters(self) -> int:
        """Scalars in its tensors."""
        return sum(tensor.numel() for tensor in self.tensors.values())
