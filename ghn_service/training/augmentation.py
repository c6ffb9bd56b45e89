"""Augmented training batches, made from uint8 arrays a whole batch at a time.

Shapes: B images, C channels, H = W rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from ghn_service.training.data import ImageSet, Normalization


@dataclass(frozen=True)
class Augmentation:
    """Random shifts and mirror images.

    Attributes:
        pad: Largest shift in pixels; the border is filled by reflection.
        flip: Whether half of the images are mirrored left to right.
    """

    pad: int = 4
    flip: bool = True

    def apply(self, images: torch.Tensor, *, generator: torch.Generator) -> torch.Tensor:
        """Augmented images (B, C, H, W) of the same type; every image has a shift and a mirror bit of its own."""
        batch, _, height, width = images.shape
        device = images.device
        if self.pad:
            pad = min(self.pad, height - 1, width - 1)
            padded = functional.pad(images.float(), (pad, pad, pad, pad), mode="reflect").to(images.dtype)
            shift = torch.randint(0, 2 * pad + 1, (2, batch), generator=generator).to(device)
            rows = shift[0, :, None] + torch.arange(height, device=device)  # (B, H)
            columns = shift[1, :, None] + torch.arange(width, device=device)  # (B, W)
            if self.flip:
                mirrored = torch.rand(batch, generator=generator).to(device) < 0.5
                columns = torch.where(mirrored[:, None], columns.flip(1), columns)
            which = torch.arange(batch, device=device)[:, None, None]
            # advanced indices around the channel axis put it last: (B, H, W, C)
            picked = padded[which, :, rows[:, :, None], columns[:, None, :]]
            return picked.permute(0, 3, 1, 2)
        if self.flip:
            mirrored = torch.rand(batch, generator=generator).to(device) < 0.5
            return torch.where(mirrored[:, None, None, None], images.flip(3), images)
        return images


@dataclass(frozen=True, eq=False)
class Batches:
    """Random training batches of an image set.

    Attributes:
        images: Where batches are drawn from, with replacement between batches.
        normalization: Channel statistics.
        augmentation: Random changes, or ``None``.
        size: Images per batch B.
    """

    images: ImageSet
    normalization: Normalization
    augmentation: Augmentation | None
    size: int

    def draw(self, *, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """One batch: normalised images (B, C, H, W) in channels_last, and labels (B,)."""
        device = self.images.images.device
        indices = torch.randint(0, len(self.images), (self.size,), generator=generator).to(device)
        pixels = self.images.images[indices]
        if self.augmentation:
            pixels = self.augmentation.apply(pixels, generator=generator)
        floats = self.normalization.apply(pixels).contiguous(memory_format=torch.channels_last)
        return floats, self.images.labels[indices]
