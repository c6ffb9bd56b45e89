"""Made-up images written as an image folder, or as IDX files."""

from __future__ import annotations

import struct
from pathlib import Path

from PIL import Image

from tests.training.made_images import coloured_images


def write_image_folder(folder: Path, *, classes: int, channels: int = 3, size: int = 16, count: int = 96) -> None:
    """Folders ``train`` and ``test`` with one folder of PNG files per class."""
    for split, seed in (("train", 0), ("test", 1)):
        images = coloured_images(count, size=size, channels=channels, classes=classes, seed=seed)
        for number, (image, label) in enumerate(zip(images.images.numpy(), images.labels.tolist(), strict=True)):
            home = folder / split / f"class{label}"
            home.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(image.transpose(1, 2, 0) if channels == 3 else image[0])
            picture.save(home / f"{number:03d}.png")


def write_idx_files(folder: Path, *, classes: int, size: int = 28, count: int = 96) -> None:
    """Gray images as MNIST and its relatives are published: four files of bytes with a header of big-endian sizes."""
    folder.mkdir(parents=True)
    for split, seed in (("train", 0), ("t10k", 1)):
        images = coloured_images(count, size=size, channels=1, classes=classes, seed=seed)
        pixels, labels = images.images[:, 0].numpy(), images.labels.numpy().astype("uint8")
        for kind, values in (("images-idx3", pixels), ("labels-idx1", labels)):
            header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
            (folder / f"{split}-{kind}-ubyte").write_bytes(header + values.tobytes())
