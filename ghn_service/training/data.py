"""Labelled images in memory: loading with a decoded-once cache, splits, and augmented batches.

Images stay uint8 (CIFAR-10 takes 184 MB) and become floats batch by batch.

Shapes: I images, B images of a batch, C channels, H = W rows and columns.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ghn_client.atomic_file import replaced_file
from ghn_service.errors import DataError
from ghn_service.training.data_layouts import READERS, SPLIT_NAMES, ImageFormat, RawImages

logger = logging.getLogger(__name__)
_CACHE_FORMAT = "1"


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images of one split.

    Attributes:
        images: (I, C, H, W) uint8.
        labels: (I,) int64.
        class_names: One name per class.
    """

    images: torch.Tensor
    labels: torch.Tensor
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Number of classes, with or without images."""
        return len(self.class_names)

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return int(self.images.shape[1])

    @property
    def image_size(self) -> int:
        """Rows (and columns) of an image."""
        return int(self.images.shape[2])

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of an image."""
        return self.channels, int(self.images.shape[2]), int(self.images.shape[3])

    def subset(self, indices: torch.Tensor) -> ImageSet:
        """The images of the given indices, in that order."""
        return ImageSet(self.images[indices], self.labels[indices], self.class_names)

    def to(self, device: torch.device) -> ImageSet:
        """The same images on another device."""
        return ImageSet(self.images.to(device), self.labels.to(device), self.class_names)


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation per channel, on the scale 0 to 1; measured on training images."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def apply(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 images (B, C, H, W) as normalised floats."""
        shape = (1, -1, 1, 1)
        mean = torch.tensor(self.mean, device=images.device).view(shape) * 255.0
        scale = torch.tensor([1.0 / (255.0 * std) for std in self.std], device=images.device).view(shape)
        return (images.float() - mean) * scale


def measure_normalization(images: ImageSet, limit: int = 5000) -> Normalization:
    """Channel statistics of the first ``limit`` images."""
    pixels = images.images[:limit].float().div_(255.0)
    std, mean = torch.std_mean(pixels, dim=(0, 2, 3))
    return Normalization(tuple(mean.tolist()), tuple(std.clamp_min(1e-3).tolist()))


def load_images(
    folder: Path, split: str, *, image_format: ImageFormat | None = None, cache: Path | None = None
) -> ImageSet | None:
    """One split of a data folder, from the cache where it was decoded before.

    Args:
        folder: Folder in one of the layouts of ``data_layouts.py``.
        split: ``train``, ``validation`` or ``test``.
        image_format: Wanted size and channels; as stored where omitted.
        cache: Folder for decoded arrays; nothing is kept where omitted.

    Returns:
        The images, or ``None`` where the folder has no such split.

    Raises:
        DataError: The folder is missing, or a file in it is broken.
    """
    if split not in SPLIT_NAMES:
        raise DataError(f"unknown split {split!r}; known are {', '.join(SPLIT_NAMES)}")
    if not folder.is_dir():
        raise DataError(f"expected a data folder, found nothing at {folder}")
    image_format = image_format or ImageFormat()
    cached = cache / f"{_cache_key(folder, split, image_format)}.safetensors" if cache else None
    if cached and (known := _read_cache(cached)):
        return known
    for layout, reader in READERS.items():
        raw = reader(folder, split, image_format)
        if raw is not None:
            logger.info("read %d %s images from %s layout", len(raw.labels), split, layout)
            return _keep(raw, cached)
    return None


def require_images(
    folder: Path, split: str, *, image_format: ImageFormat | None = None, cache: Path | None = None
) -> ImageSet:
    """Like ``load_images``, for a split that must be there.

    Raises:
        DataError: It is not.
    """
    images = load_images(folder, split, image_format=image_format, cache=cache)
    if images is None or len(images) == 0:
        raise DataError(
            f"no {split} images in {folder}: expected one of the layouts {', '.join(READERS)} "
            f"(for example {split}.parquet, or a folder {split} with one folder per class)"
        )
    return images


def split_validation(images: ImageSet, count: int, seed: int = 0) -> tuple[ImageSet, ImageSet]:
    """Training images without ``count`` seeded random ones, and those."""
    if not 0 < count < len(images):
        raise DataError(f"cannot hold out {count} of {len(images)} training images for validation")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images.subset(order[count:]), images.subset(order[:count])


def _cache_key(folder: Path, split: str, image_format: ImageFormat) -> str:
    """Name of a cache file: it changes with the files' names, sizes and times, and with the format."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    stamps = [f"{path.relative_to(folder)}|{path.stat().st_size}|{path.stat().st_mtime_ns}" for path in files]
    text = "\n".join([_CACHE_FORMAT, split, repr(image_format), str(folder.resolve()), *stamps])
    return f"{folder.name}-{split}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _read_cache(path: Path) -> ImageSet | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            names = tuple((file.metadata() or {}).get("class_names", "").split("\n"))
            return ImageSet(file.get_tensor("images"), file.get_tensor("labels"), names)
    except (SafetensorError, OSError) as error:
        logger.warning("ignoring a broken cache file %s: %s", path.name, error)
        return None


def _keep(raw: RawImages, cached: Path | None) -> ImageSet:
    images = ImageSet(torch.from_numpy(raw.images.copy()), torch.from_numpy(raw.labels), raw.class_names)
    if cached:
        cached.parent.mkdir(parents=True, exist_ok=True)
        names = {"class_names": "\n".join(raw.class_names)}
        with replaced_file(cached) as part:
            save_file({"images": images.images, "labels": images.labels}, part, metadata=names)
    return images
