"""Training recipes at equal compute, and the speed of training beside its limit; each call prints one JSON line.

``python -m benchmarks.training recipe --data DIR --processor-s 120 --set NAME=VALUE ...`` trains one hypernetwork and
scores it on networks and images that training never saw: one network in five of the family is held out, and 512
training images. Families: ``narrow``, that of the training tests (112 plain networks), in which a
recipe shows its worth within a minute or two; ``tiny``, ResNets and plain convolutional networks of the generator of at
most four million multiply-adds; ``deep``, residual networks of 5 to 18 blocks per stage. With ``--processor-s`` the
length of a run is what a trial of 100 steps says will fit.

``python -m benchmarks.training speed --data DIR`` gives networks per second of processor time beside a plain loop that
does the same passes (same networks, batches and number format) with ordinary parameters and no update. Both take turns
on small groups of networks, so that a busy machine slows them alike.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from ghn_architectures.generator import Budget, sample_architecture
from ghn_client.batchnorm import use_batch_statistics
from ghn_client.finetune.images import measure_normalization
from ghn_service.training.distributed import Workers
from ghn_service.training.evaluation.zero_shot import make_validation
from ghn_service.training.images import interface_of, require_split, split_validation
from ghn_service.training.networks import Pool, to_channels_last
from ghn_service.training.precision import avoid_slow_layers, keep_freed_memory, target_passes
from ghn_service.training.run_log import read_log
from ghn_service.training.settings import TrainingSettings, load_settings
from ghn_service.training.trainer import Trainer
from tests.training.small_networks import SmallArchitecture

BASE = (
    "sampling.start_macs=1e9",
    "sampling.largest_macs=1e9",
    "sampling.budget_macs=1e9",
    "limits.save_minutes=1000",
    "limits.validate_minutes=0",
    "limits.log_every=500",
    "limits.steps=2000",
)
WARM_STEPS, TRIAL_STEPS = 20, 80
EVERY_FIFTH = 5
TINY_NETWORKS, DEEP_NETWORKS = 400, 150
ALONE = Workers(0, 1, torch.device("cpu"))


def narrow_family() -> list[Any]:
    """Every network of the family of the training tests once."""
    candidates = (SmallArchitecture(index) for index in range(5000))
    return list({(item.width, item.depth, item.kernel, item.stride_at): item for item in candidates}.values())


def tiny_family() -> list[Any]:
    """Small convolutional networks of the generator, each once."""
    drawn = (
        sample_architecture("train", index, families=("resnet", "convnet"), size="tiny")
        for index in range(TINY_NETWORKS)
    )
    distinct = {item.configuration: item for item in drawn}.values()
    return list(distinct)


def deep_family() -> list[Any]:
    """Residual networks of 5 to 18 blocks per stage, each once."""
    budget = Budget(1_000_000, 12_000_000, most_nodes=240)
    drawn = (
        sample_architecture("train_deep", index, families=("resnet",), budget=budget) for index in range(DEEP_NETWORKS)
    )
    return list({item.configuration: item for item in drawn}.values())


FAMILIES: dict[str, Callable[[], list[Any]]] = {"narrow": narrow_family, "tiny": tiny_family, "deep": deep_family}


def compare_recipe(options: argparse.Namespace) -> dict[str, Any]:
    """Trains once and scores the averaged hypernetwork."""
    networks = FAMILIES[options.family]()
    known = [item for number, item in enumerate(networks) if number % EVERY_FIFTH]
    unseen = networks[::EVERY_FIFTH]
    images, held_out = split_validation(require_split(options.data, "train", cache=options.cache), 5000)
    normalization = measure_normalization(images)

    def make_trainer(settings: TrainingSettings, folder: str) -> Trainer:
        draw = lambda index: random.Random(index).choice(known)  # noqa: E731
        trainer = Trainer(settings, images, normalization, draw, Path(folder), ALONE)
        for index, architecture in enumerate(known):
            trainer._prepare(index, architecture)
        return trainer

    settings: TrainingSettings = load_settings(None, (*BASE, *options.changes))
    with tempfile.TemporaryDirectory() as folder:
        if options.processor_s:
            steps = affordable_steps(make_trainer(settings, folder), options.processor_s)
            settings = load_settings(None, (*BASE, *options.changes, f"limits.steps={steps}"))
        trainer = make_trainer(settings, folder)
        started = time.process_time()
        trainer.run()
        processor_s = time.process_time() - started
        records = read_log(Path(folder))
    score = make_validation(unseen.__getitem__, range(len(unseen)), held_out.first(512), normalization)
    curve = [{key: item[key] for key in ("step", "loss", "accuracy")} for item in records if item["kind"] == "train"]
    return {
        "family": options.family,
        "accuracy": score(trainer.averaged())["accuracy"],
        "parameters": trainer.hypernetwork.num_parameters,
        "steps": trainer.progress.step,
        "processor_s": round(processor_s, 1),
        "curve": curve,
    }


def affordable_steps(trainer: Trainer, processor_s: float) -> int:
    """Steps that fit into this much processor time."""
    for _ in range(WARM_STEPS):
        trainer.step()
    started = time.process_time()
    for _ in range(TRIAL_STEPS):
        trainer.step()
    return max(1, round(processor_s * TRIAL_STEPS / (time.process_time() - started)))


def measure_speed(options: argparse.Namespace) -> dict[str, Any]:
    """Networks per processor second of training and of the plain loop, over the same networks."""
    settings: TrainingSettings = load_settings(options.config, options.changes)
    images = require_split(options.data, "train", cache=options.cache)
    source = Pool(settings.sampling.split, interface_of(images), settings.sampling.pool)
    generator = torch.Generator().manual_seed(0)
    training_s = plain_s = 0.0
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(settings, images, measure_normalization(images), source, Path(folder), ALONE)
        for group in range(options.groups):
            start = trainer.stream.next_index
            chosen = trainer.stream.take(options.group_size, 1.0)
            modules = [
                avoid_slow_layers(use_batch_statistics(to_channels_last(architecture.build()))).train()
                for _, architecture in chosen
            ]
            for index, architecture in chosen:
                trainer._prepare(index, architecture)  # as in every round of the pool but the first
            if group == 0:
                plain_passes(trainer, modules[:1], generator)
                trainer.step()
            trainer.stream.next_index = start
            before = time.process_time()
            for _ in range(options.group_size // settings.sampling.meta_batch):
                trainer.step()
            middle = time.process_time()
            plain_passes(trainer, modules, generator)
            training_s += middle - before
            plain_s += time.process_time() - middle
    networks = options.groups * options.group_size
    return {
        "precision": str(trainer.precision),
        "networks": networks,
        "batches_per_network": settings.data.batches_per_network,
        "training_per_s": networks / training_s,
        "plain_per_s": networks / plain_s,
        "share_of_limit": plain_s / training_s,
    }


def plain_passes(trainer: Trainer, modules: Sequence[torch.nn.Module], generator: torch.Generator) -> None:
    """Forward and backward of ordinary networks for each of a prediction's batches of images."""
    for module in modules:
        module.zero_grad(set_to_none=True)
        for _ in range(trainer.settings.data.batches_per_network):
            images, labels = trainer.batches.draw(generator=generator)
            with target_passes(images.device, trainer.precision):
                logits = module(images)
            functional.cross_entropy(logits.float(), labels, label_smoothing=0.1).backward()  # type: ignore[no-untyped-call]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    recipe = commands.add_parser("recipe", help="compare recipes")
    recipe.add_argument("--family", choices=FAMILIES, default="narrow")
    recipe.add_argument("--processor-s", type=float, help="processor seconds of training; limits.steps where omitted")
    recipe.set_defaults(measure=compare_recipe)
    speed = commands.add_parser("speed", help="networks per second")
    speed.add_argument("--config", type=Path)
    speed.add_argument("--groups", type=int, default=12)
    speed.add_argument("--group-size", type=int, default=8)
    speed.set_defaults(measure=measure_speed)
    for command in (recipe, speed):
        command.add_argument("--data", type=Path, required=True)
        command.add_argument("--cache", type=Path)
        command.add_argument("--set", action="append", default=[], dest="changes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    result = options.measure(options)
    print(json.dumps({"benchmark": options.measure.__name__, "changes": options.changes, **result}))


if __name__ == "__main__":
    main()
