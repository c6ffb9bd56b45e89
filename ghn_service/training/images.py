"""The images of a run: decoded once and kept, split, and drawn in augmented batches, a whole batch at a time.

Images stay bytes (CIFAR-10 takes 184 MB) and become floats batch by batch.

Shapes: B images, C channels, H = W rows and columns.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn import functional

from ghn_architectures.architecture import Interface
from ghn_client.atomic_file import replaced_file
from ghn_client.finetune.images import ImageSet, Normalization, read_images
from ghn_service.errors import DataError
from ghn_service.training.settings import DataSettings

logger = logging.getLogger(__name__)
_CACHE_FORMAT = "3"


def load_split(
    folder: Path, split: str, *, image_size: int | None = None, channels: int | None = None, cache: Path | None = None
) -> ImageSet | None:
    """One split of a data folder, from the cache where it was decoded before; ``None`` where there is no such split.

    Layouts are those of ``ghn_client.finetune.images``; size and channels stay as stored where they are omitted.

    Raises:
        InvalidOptionError: The folder is missing (of the client's errors, as those below).
        FileError: A file in it is broken.
    """
    if cache is None or not folder.is_dir():
        return read_images(folder, split, image_size=image_size, channels=channels)
    path = cache / f"{_cache_key(folder, split, image_size, channels)}.safetensors"
    if path.is_file():
        try:
            with safe_open(path, framework="pt") as file:
                names = tuple((file.metadata() or {}).get("class_names", "").split("\n"))
                return ImageSet(file.get_tensor("images"), file.get_tensor("labels"), names)
        except (SafetensorError, OSError) as error:
            logger.warning("ignoring a broken cache file %s: %s", path.name, error)
    images = read_images(folder, split, image_size=image_size, channels=channels)
    if images is not None:
        cache.mkdir(parents=True, exist_ok=True)
        with replaced_file(path) as part:
            names_text = {"class_names": "\n".join(images.class_names)}
            save_file({"images": images.images, "labels": images.labels}, part, metadata=names_text)
    return images


def _cache_key(folder: Path, split: str, *image_format: int | None) -> str:
    """Name of a cache file: it changes with the files' names, sizes and times, and with the format."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    stamps = [f"{path.relative_to(folder)}|{path.stat().st_size}|{path.stat().st_mtime_ns}" for path in files]
    text = "\n".join([_CACHE_FORMAT, split, repr(image_format), str(folder.resolve()), *stamps])
    return f"{folder.name}-{split}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def require_split(
    folder: Path, split: str, *, image_size: int | None = None, channels: int | None = None, cache: Path | None = None
) -> ImageSet:
    """Like ``load_split``, for a split that must be there.

    Raises:
        DataError: It is not.
    """
    images = load_split(folder, split, image_size=image_size, channels=channels, cache=cache)
    if images is None:
        raise DataError(
            f"no {split} images in {folder}: expected parquet, CIFAR batches, IDX or a folder per class "
            f"(for example {split}.parquet, or {split}/<class>/*.png)"
        )
    return images


def split_validation(images: ImageSet, count: int, seed: int = 0) -> tuple[ImageSet, ImageSet]:
    """Training images without ``count`` seeded random ones, and those."""
    if not 0 < count < len(images):
        raise DataError(f"cannot hold out {count} of {len(images)} training images for validation")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images.subset(order[count:]), images.subset(order[:count])


def digest_images(images: ImageSet) -> str:
    """A short hash of pixels and labels in their order, whatever file or layout they were decoded from."""
    digest = hashlib.sha256(repr(tuple(images.images.shape)).encode())
    for block in (*torch.split(images.images, 4096), images.labels):
        digest.update(block.contiguous().cpu().numpy().data)
    return digest.hexdigest()[:16]


def interface_of(images: ImageSet) -> Interface:
    """Sizes of input and output of networks for these images."""
    return Interface(images.num_classes, images.channels, images.image_size)


def load_training_data(folder: Path, settings: DataSettings, cache: Path | None) -> tuple[ImageSet, ImageSet]:
    """Training and validation images of a folder; the latter are held out where the folder has none.

    Raises:
        DataError: The folder has no training images.
    """
    training = require_split(folder, "train", image_size=settings.image_size, channels=settings.channels, cache=cache)
    validation = load_split(
        folder, "validation", image_size=training.image_size, channels=training.channels, cache=cache
    )
    if validation is None:
        count = min(settings.validation_images, max(1, len(training) // 5))
        training, validation = split_validation(training, count)
    return training, validation


@dataclass(frozen=True)
class Augmentation:
    """Random shifts by at most ``pad`` pixels, the border filled by reflection, and ``flip`` of half of the images."""

    pad: int = 4
    flip: bool = True

    def apply(self, images: torch.Tensor, *, generator: torch.Generator) -> torch.Tensor:
        """Augmented images (B, C, H, W) of the same type; every image has a shift and a mirror bit of its own."""
        if not self.pad and not self.flip:
            return images
        batch, _, height, width = images.shape
        device = images.device
        pad = min(self.pad, height - 1, width - 1)
        padded = functional.pad(images.float(), (pad, pad, pad, pad), mode="reflect").to(images.dtype)
        shift = torch.randint(0, 2 * pad + 1, (2, batch), generator=generator, device=generator.device).to(device)
        rows = shift[0, :, None] + torch.arange(height, device=device)  # (B, H)
        columns = shift[1, :, None] + torch.arange(width, device=device)  # (B, W)
        if self.flip:
            mirrored = torch.rand(batch, generator=generator, device=generator.device).to(device) < 0.5
            columns = torch.where(mirrored[:, None], columns.flip(1), columns)
        which = torch.arange(batch, device=device)[:, None, None]
        # advanced indices around the channel axis put it last: (B, H, W, C)
        return padded[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@dataclass(frozen=True, eq=False)
class Batches:
    """Random training batches of ``size`` images each, drawn with replacement."""

    images: ImageSet
    normalization: Normalization
    augmentation: Augmentation
    size: int

    def draw(self, *, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """One batch: normalised images (B, C, H, W) in channels_last, and labels (B,)."""
        device = self.images.images.device
        indices = torch.randint(0, len(self.images), (self.size,), generator=generator, device=generator.device)
        indices = indices.to(device)
        pixels = self.augmentation.apply(self.images.images[indices], generator=generator)
        floats = self.normalization.apply(pixels).contiguous(memory_format=torch.channels_last)
        return floats, self.images.labels[indices]
