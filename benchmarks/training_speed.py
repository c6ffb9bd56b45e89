"""Architectures per second of hypernetwork training, beside the limit: a plain loop over the same target networks.

The plain loop does the same forward and backward passes (same networks, batches and number format) with ordinary
parameters, and nothing else: no prediction, no gradient of a hypernetwork, no update. Both take turns on small groups
of networks, so that a busy machine slows them alike; times are those of the processor.

Run with ``python -m benchmarks.training_speed --data DIR``; prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from torch.nn import functional

from ghn_service.training.data import measure_normalization, require_images
from ghn_service.training.distributed import Workers
from ghn_service.training.memory import keep_freed_memory
from ghn_service.training.networks import Pool, Task
from ghn_service.training.passes import avoid_slow_layers, target_passes
from ghn_service.training.sampling import TargetArchitecture, to_channels_last, use_batch_statistics
from ghn_service.training.settings import load_settings
from ghn_service.training.trainer import Trainer


def plain_passes(trainer: Trainer, module: torch.nn.Module, generator: torch.Generator) -> None:
    """Forward and backward of one network with ordinary parameters, for each of a prediction's batches of images."""
    module.zero_grad(set_to_none=True)
    for _ in range(trainer.settings.data.batches_per_network):
        images, labels, _ = trainer.batches.draw(generator=generator)
        with target_passes(images.device, trainer.precision):
            logits = module(images)
        functional.cross_entropy(logits.float(), labels, label_smoothing=0.1).backward()


def ordinary_module(architecture: TargetArchitecture) -> torch.nn.Module:
    return avoid_slow_layers(use_batch_statistics(to_channels_last(architecture.build()))).train()


def measure(trainer: Trainer, *, groups: int, group_size: int) -> dict[str, float]:
    """Processor seconds per network of training and of the plain loop, over the same networks."""
    generator = torch.Generator().manual_seed(0)
    training_s = plain_s = 0.0
    for group in range(groups):
        start = trainer.stream.next_index
        chosen = trainer.stream.take(group_size, 1.0)
        modules = [ordinary_module(architecture) for _, architecture in chosen]
        for index, architecture in chosen:
            trainer._prepare(index, architecture)  # as in every round of the pool but the first
        if group == 0:
            plain_passes(trainer, modules[0], generator)
            trainer.step()
        trainer.stream.next_index = start
        before = time.process_time()
        for _ in range(group_size // trainer.settings.sampling.meta_batch):
            trainer.step()
        middle = time.process_time()
        for module in modules:
            plain_passes(trainer, module, generator)
        training_s += middle - before
        plain_s += time.process_time() - middle
    networks = groups * group_size
    return {
        "networks": networks,
        "batches_per_network": trainer.settings.data.batches_per_network,
        "training_per_s": networks / training_s,
        "plain_per_s": networks / plain_s,
        "share_of_limit": plain_s / training_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="changes")
    parser.add_argument("--groups", type=int, default=12)
    parser.add_argument("--group-size", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    settings = load_settings(options.config, options.changes)
    images = require_images(options.data, "train", cache=options.cache)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            settings,
            images,
            measure_normalization(images),
            Pool("train", Task(images.num_classes, images.channels, images.image_size), settings.sampling.pool),
            Path(folder),
            Workers(0, 1, torch.device("cpu")),
        )
        result = measure(trainer, groups=options.groups, group_size=options.group_size)
    print(json.dumps({"benchmark": "training_speed", "precision": str(trainer.precision), **result}))


if __name__ == "__main__":
    main()
