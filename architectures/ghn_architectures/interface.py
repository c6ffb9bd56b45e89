"""``Interface``: what a task fixes about a network, whatever its architecture."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import nn

from ghn_service.errors import InvalidOptionError


@dataclass(frozen=True, slots=True)
class Interface:
    """Sizes of a network's input and output.

    Attributes:
        num_classes: Number of classes K of the output (B, K).
        in_channels: Channels of the input (B, in_channels, image_size, image_size).
        image_size: Side of the input image.

    Raises:
        InvalidOptionError: A size is out of range.
    """

    num_classes: int = 10
    in_channels: int = 3
    image_size: int = 32

    def __post_init__(self) -> None:
        for name, value, least in (
            ("num_classes", self.num_classes, 1),
            ("in_channels", self.in_channels, 1),
            ("image_size", self.image_size, 16),
        ):
            if value < least:
                raise InvalidOptionError(f"{name} must be at least {least}, got {value}", field=name)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of one example."""
        return (self.in_channels, self.image_size, self.image_size)


class Configuration(Hashable, Protocol):
    """Everything that decides an architecture of one family, as a frozen and hashable value."""

    family: ClassVar[str]

    def build(self, interface: Interface) -> nn.Module:
        """The network for ``interface``."""
        ...
