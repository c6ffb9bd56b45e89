"""A trainer small enough to run many times in a test."""

from __future__ import annotations

from pathlib import Path

import torch

from ghn_service.training.distributed import Workers
from ghn_service.training.settings import TrainingSettings, load_settings
from ghn_service.training.trainer import Trainer
from tests.training.made_images import coloured_images, normalization_of
from tests.training.small_networks import SmallArchitecture

SMALL = (
    "hypernetwork={hidden_channels=8, num_heads=2, num_layers=1, max_shape=[8,8,5,5], num_classes=4}",
    "data.batch_size=8",
    "sampling.budget_macs=1e12",
    "sampling.largest_macs=1e12",
    "sampling.start_macs=1e12",
    "optimizer.name=adamw",
    "optimizer.schedule=cosine",
    "optimizer.clip=5.0",
    "limits.log_every=1",
    "limits.validate_minutes=0",
    "optimizer.ema_every=1",
    "precision=float32",
)


def small_source(index: int) -> SmallArchitecture:
    return SmallArchitecture(index, image_size=16, num_classes=4)


def small_settings(*changes: str) -> TrainingSettings:
    return load_settings(None, (*SMALL, *changes))


def make_trainer(
    folder: Path, *changes: str, source=small_source, workers: Workers | None = None, image_seed: int = 0
) -> Trainer:
    images = coloured_images(256, seed=image_seed)
    return Trainer(
        small_settings(*changes),
        images,
        normalization_of(images),
        source,
        folder,
        workers or Workers(0, 1, torch.device("cpu")),
    )
