"""Compares training recipes at equal compute: each call trains one hypernetwork and prints one JSON line.

The line has the recipe, median loss and accuracy along the way, and the accuracy of averaged hypernetworks on networks
and images that training never saw: one network in five of the family is held out, and 512 training images.

Families: ``narrow``, that of the training tests (112 plain networks of 2 to 5 convolutions), in which a recipe shows
its worth within a minute or two; ``tiny``, ResNets and plain convolutional networks of the generator of at most four
million multiply-adds, with every normalisation and up to 256 channels, so that wide layers are tiled.

With ``--processor-s`` the length of a run is the number of steps that a trial of 100 steps says will fit.

Run with ``python -m benchmarks.training_recipes --data DIR --processor-s 120 --set NAME=VALUE ...``.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ghn_architectures.generator import sample_architecture
from ghn_service.hypernetwork.ghn import GraphHyperNetwork
from ghn_service.training.data import ImageSet, Normalization, measure_normalization, require_images, split_validation
from ghn_service.training.distributed import Workers
from ghn_service.training.memory import keep_freed_memory
from ghn_service.training.networks import SampledNetwork
from ghn_service.training.optimizers import MovingAverage
from ghn_service.training.run_log import read_log
from ghn_service.training.sampling import TargetArchitecture
from ghn_service.training.settings import TrainingSettings, load_settings
from ghn_service.training.teacher import load_teacher_logits
from ghn_service.training.trainer import Trainer
from ghn_service.training.zero_shot import make_validation
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
TINY_NETWORKS = 400


@dataclass(frozen=True, eq=False)
class Setting:
    """What all runs of one comparison share.

    Attributes:
        training: Networks to train on.
        unseen: Networks to score.
        images: Images to train on.
        held_out: Images to score on.
        normalization: Channel statistics.
        teacher_logits: Soft labels of ``images``, (I, classes), or None.
    """

    training: Sequence[TargetArchitecture]
    unseen: Sequence[TargetArchitecture]
    images: ImageSet
    held_out: ImageSet
    normalization: Normalization
    teacher_logits: Tensor | None

    def draw(self, index: int) -> TargetArchitecture:
        """Training network number ``index`` of an endless random sequence."""
        return random.Random(index).choice(self.training)

    def trainer(self, settings: TrainingSettings, folder: Path) -> Trainer:
        """A training run with all its networks prepared."""
        trainer = Trainer(
            settings,
            self.images,
            self.normalization,
            self.draw,
            folder,
            Workers(0, 1, torch.device("cpu")),
            teacher_logits=self.teacher_logits,
        )
        for index, architecture in enumerate(self.training):
            trainer._prepare(index, architecture)
        return trainer


def narrow_family() -> list[TargetArchitecture]:
    """Every network of the family of the training tests once."""
    candidates = (SmallArchitecture(index) for index in range(5000))
    return list({(item.width, item.depth, item.kernel, item.stride_at): item for item in candidates}.values())


def tiny_family() -> list[TargetArchitecture]:
    """Small convolutional networks of the generator, each once."""
    drawn = (
        sample_architecture("train", index, families=("resnet", "convnet"), size="tiny")
        for index in range(TINY_NETWORKS)
    )
    distinct = {item.configuration: item for item in drawn}.values()
    return [SampledNetwork(item, item.multiply_adds) for item in distinct]


FAMILIES = {"narrow": narrow_family, "tiny": tiny_family}


def make_setting(family: str, data: Path, cache: Path | None, teacher: Path | None) -> Setting:
    networks = FAMILIES[family]()
    images, held_out = split_validation(require_images(data, "train", cache=cache), 5000)
    return Setting(
        [item for number, item in enumerate(networks) if number % EVERY_FIFTH],
        networks[::EVERY_FIFTH],
        images,
        held_out.subset(torch.arange(512)),
        measure_normalization(images),
        load_teacher_logits(teacher, images) if teacher else None,
    )


class SeveralAverages:
    """Moving averages of several decays over one run, in the place of the trainer's own."""

    def __init__(self, hypernetwork: nn.Module, decays: Sequence[float], every: int) -> None:
        self.averages = {decay: MovingAverage(hypernetwork, decay, every) for decay in decays}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """State of the first average, for the trainer's own purposes."""
        return next(iter(self.averages.values())).tensors

    def update(self, module: nn.Module, step: int) -> None:
        """Takes the present state into each average."""
        for average in self.averages.values():
            average.update(module, step)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Replaces each average."""
        for average in self.averages.values():
            average.load(tensors)


def affordable_steps(setting: Setting, settings: TrainingSettings, processor_s: float) -> int:
    """Steps that fit into this much processor time."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = setting.trainer(settings, Path(folder))
        for _ in range(WARM_STEPS):
            trainer.step()
        started = time.process_time()
        for _ in range(TRIAL_STEPS):
            trainer.step()
        return max(1, round(processor_s * TRIAL_STEPS / (time.process_time() - started)))


def run(setting: Setting, settings: TrainingSettings, decays: Sequence[float]) -> dict[str, Any]:
    """Trains once and scores each average."""
    score = make_validation(
        setting.unseen.__getitem__, range(len(setting.unseen)), setting.held_out, setting.normalization
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = setting.trainer(settings, Path(folder))
        averages = SeveralAverages(trainer.hypernetwork, decays, settings.optimizer.ema_every)
        trainer.average = averages  # type: ignore[assignment]
        started = time.process_time()
        trainer.run()
        processor_s = time.process_time() - started
        records = read_log(Path(folder))
    scores = {}
    for decay, average in averages.averages.items():
        hypernetwork = GraphHyperNetwork(trainer.config)
        hypernetwork.load_state_dict(average.tensors)
        scores[str(decay)] = score(hypernetwork.eval())["accuracy"]
    curve = [{key: item[key] for key in ("step", "loss", "accuracy")} for item in records if item["kind"] == "train"]
    return {
        "accuracy": scores[str(decays[0])],
        "by_ema_decay": scores,
        "parameters": trainer.hypernetwork.num_parameters,
        "steps": trainer.progress.step,
        "processor_s": round(processor_s, 1),
        "curve": curve,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--family", choices=FAMILIES, default="narrow")
    parser.add_argument("--teacher", type=Path, help="soft labels that ghn-train teacher wrote")
    parser.add_argument("--processor-s", type=float, help="processor seconds of training; limits.steps where omitted")
    parser.add_argument("--ema", type=float, action="append", help="decay to score; may be repeated")
    parser.add_argument("--set", action="append", default=[], dest="changes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    settings = load_settings(None, (*BASE, *options.changes))
    setting = make_setting(options.family, options.data, options.cache, options.teacher)
    if options.processor_s:
        steps = affordable_steps(setting, settings, options.processor_s)
        settings = load_settings(None, (*BASE, *options.changes, f"limits.steps={steps}"))
    result = run(setting, settings, options.ema or [settings.optimizer.ema_decay])
    named = {"family": options.family, "processor_s_wanted": options.processor_s, "teacher": bool(options.teacher)}
    print(json.dumps({"benchmark": "training_recipes", "changes": options.changes, **named, **result}))


if __name__ == "__main__":
    main()
