"""Small made-up image sets that a network can learn."""

from __future__ import annotations

import torch

from ghn_client.finetune.images import ImageSet, Normalization, measure_normalization


def coloured_images(
    count: int = 128, *, size: int = 16, channels: int = 3, classes: int = 4, seed: int = 0
) -> ImageSet:
    """Noise images whose mean brightness per half tells the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=generator)
    images = torch.randint(0, 96, (count, channels, size, size), generator=generator)
    for label in range(classes):
        rows = labels == label
        images[rows, label % channels, : size // 2] += 40 * (1 + label // channels)
        images[rows, (label + 1) % channels, size // 2 :] += 60
    return ImageSet(images.clamp(0, 255).to(torch.uint8), labels, tuple(f"class {index}" for index in range(classes)))


def normalization_of(images: ImageSet) -> Normalization:
    return measure_normalization(images)
