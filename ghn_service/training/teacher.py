"""Soft labels: the logits of a trained teacher for every training image, computed once.

Reference: Hinton et al. 2015 (arXiv:1503.02531).
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from ghn_service.errors import DataError
from ghn_service.training.augmentation import Augmentation, Batches
from ghn_service.training.data import ImageSet, Normalization
from ghn_service.training.passes import avoid_slow_layers, target_passes
from ghn_service.training.sampling import to_channels_last

logger = logging.getLogger(__name__)


def train_teacher(
    module: nn.Module,
    images: ImageSet,
    normalization: Normalization,
    *,
    minutes: float,
    learning_rate: float = 0.2,
    batch_size: int = 128,
    precision: torch.dtype = torch.float32,
    seed: int = 0,
) -> nn.Module:
    """Trains ``module`` for some minutes: SGD with momentum, a triangular rate over the clock, smoothed labels."""
    module = avoid_slow_layers(to_channels_last(module)).train()
    batches = Batches(images, normalization, Augmentation(), batch_size)
    optimizer = torch.optim.SGD(module.parameters(), momentum=0.9, nesterov=True, weight_decay=5e-4)
    generator = torch.Generator().manual_seed(seed)
    start, step = time.monotonic(), 0
    while (done := (time.monotonic() - start) / (60.0 * minutes)) < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(done / 0.15, (1.0 - done) / 0.85)
        pixels, labels, _ = batches.draw(generator=generator)
        with target_passes(pixels.device, precision):
            logits = module(pixels)
        loss = functional.cross_entropy(logits.float(), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        step += 1
        if step % 100 == 0:
            logger.info("teacher step %d: loss %.3f, %.0f%% of the time", step, loss.item(), 100 * done)
    return module.eval()


@torch.no_grad()
def image_logits(module: nn.Module, images: ImageSet, normalization: Normalization) -> Tensor:
    """Logits of every image, (I, classes): the mean over the image and its mirror image."""
    parts = []
    for start in range(0, len(images), 250):
        pixels = normalization.apply(images.images[start : start + 250]).contiguous(memory_format=torch.channels_last)
        parts.append(0.5 * (module(pixels) + module(pixels.flip(3))))
    return torch.cat(parts)


def save_teacher_logits(logits: Tensor, path: Path) -> None:
    """Writes soft labels in half precision."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"logits": logits.half().contiguous()}, path)


def load_teacher_logits(path: Path, images: ImageSet) -> Tensor:
    """Reads soft labels, (I, classes), for ``images``.

    Raises:
        DataError: The file is damaged or belongs to other images.
    """
    try:
        with safe_open(path, framework="pt") as file:
            logits: Tensor = file.get_tensor("logits").float()
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot read soft labels from {path.name}: {error}") from error
    if logits.shape != (len(images), images.num_classes):
        raise DataError(
            f"{path.name} has soft labels of shape {tuple(logits.shape)}, expected "
            f"{(len(images), images.num_classes)}; "
            "make them from the same data and validation split"
        )
    return logits
