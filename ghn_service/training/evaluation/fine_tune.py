"""The fine-tuning comparison: predicted starts against He initialisation, at equal small budgets.

One run trains with a constant learning rate and is scored along the way, so that it serves every budget up to its
length and shows how many steps a start saves. Each side chooses its rate from the same grid on validation images, with
the first seed; the others use that rate.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from ghn_client.finetune.images import ImageSet, Normalization
from ghn_service.training.evaluation.zero_shot import batch_accuracy
from ghn_service.training.images import Augmentation, Batches
from ghn_service.training.networks import to_channels_last
from ghn_service.training.precision import avoid_slow_layers, target_passes
from ghn_service.training.step import slot_generator


@dataclass(frozen=True)
class FineTuneSettings:
    """How networks are fine-tuned.

    Attributes:
        learning_rates: The grid.
        choose_at: Steps after which a side keeps only its best learning rate.
        budgets: Steps at which the two sides are compared.
        longest: Steps of the He side, so that its way to the predicted side's accuracy can be counted.
        every: Steps between two points of a curve.
        batch_size: Images per step.
        weight_decay: Weight decay.
        clip: Largest gradient norm.
        optimizer: ``sgd`` (momentum 0.9) or ``adamw``.
        schedule: ``constant``, which serves every budget with one run, or ``cosine`` to zero at the end of the run.
    """

    learning_rates: tuple[float, ...] = (0.01, 0.03, 0.1)
    choose_at: int = 100
    budgets: tuple[int, ...] = (100, 500)
    longest: int = 800
    every: int = 50
    batch_size: int = 64
    weight_decay: float = 5e-4
    clip: float = 5.0
    optimizer: Literal["sgd", "adamw"] = "sgd"
    schedule: Literal["constant", "cosine"] = "constant"


@dataclass(frozen=True)
class Curve:
    """Accuracy on test images after some numbers of fine-tuning steps, with the learning rate that was chosen."""

    learning_rate: float
    steps: tuple[int, ...]
    test: tuple[float, ...]

    def at(self, step: int) -> float:
        """Test accuracy after ``step`` steps, which must be a point of the curve."""
        return self.test[self.steps.index(step)]

    def steps_to_reach(self, accuracy: float) -> int | None:
        """First point with at least this accuracy, interpolated between points; None if there is none."""
        for index, (step, value) in enumerate(zip(self.steps, self.test, strict=True)):
            if value >= accuracy:
                if index == 0:
                    return step
                before_step, before = self.steps[index - 1], self.test[index - 1]
                return before_step + math.ceil((step - before_step) * (accuracy - before) / (value - before))
        return None


@dataclass(frozen=True, eq=False)
class FineTuneData:
    """Images to fine-tune on, to choose learning rates on, and to report on, with their channel statistics."""

    training: ImageSet
    validation: ImageSet
    test: ImageSet
    normalization: Normalization


class _Run:
    """One network being fine-tuned with one learning rate; every draw depends on the seed and the step alone."""

    def __init__(
        self,
        module: nn.Module,
        data: FineTuneData,
        settings: FineTuneSettings,
        rate: float,
        seed: int,
        precision: torch.dtype,
    ) -> None:
        self.module = avoid_slow_layers(to_channels_last(copy.deepcopy(module))).train()
        self.settings, self.rate, self.precision, self.data = settings, rate, precision, data
        self.batches = Batches(data.training, data.normalization, Augmentation(), settings.batch_size)
        self.seed, self.generator = seed, torch.Generator().manual_seed(seed)
        groups, decay = self.module.parameters(), settings.weight_decay
        if settings.optimizer == "sgd":
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9, weight_decay=decay)
        else:
            self.optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=decay)
        self.step = 0
        self.points: list[tuple[int, float]] = [(0, self.score(data.test))]

    def score(self, images: ImageSet) -> float:
        with target_passes(images.images.device, self.precision):
            return batch_accuracy(self.module, images, self.data.normalization)

    def advance(self, steps: int) -> None:
        while self.step < steps:
            if self.settings.schedule == "cosine":
                for group in self.optimizer.param_groups:
                    group["lr"] = self.rate * 0.5 * (1 + math.cos(math.pi * self.step / self.settings.longest))
            pixels, labels = self.batches.draw(generator=self.generator)
            own = [pixels.device] if pixels.is_cuda else []
            with torch.random.fork_rng(devices=own), target_passes(pixels.device, self.precision):
                torch.manual_seed(slot_generator(self.seed, self.step).initial_seed())  # dropout inside the network
                logits = self.module(pixels)
            loss = functional.cross_entropy(logits.float(), labels)
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.settings.clip)
            if torch.isfinite(norm):
                self.optimizer.step()
            self.step += 1
            if self.step % self.settings.every == 0:
                self.points.append((self.step, self.score(self.data.test)))


def fine_tune(
    module: nn.Module,
    data: FineTuneData,
    settings: FineTuneSettings,
    *,
    steps: int,
    seed: int,
    precision: torch.dtype = torch.float32,
    learning_rate: float | None = None,
) -> Curve:
    """Fine-tunes copies of ``module`` with every rate of the grid, goes on with the best, and returns its curve.

    ``steps`` is the length of the curve, a multiple of ``settings.every``; ``seed`` gives the order of the images and
    what dropout leaves out, the same for both sides of a comparison; ``learning_rate`` is the rate where it is chosen
    already. Global generators stay as they were.
    """
    rates = settings.learning_rates if learning_rate is None else (learning_rate,)
    runs = [_Run(module, data, settings, rate, seed, precision) for rate in rates]
    if len(runs) > 1:
        for run in runs:
            run.advance(min(settings.choose_at, steps))
        runs.sort(key=lambda run: run.score(data.validation), reverse=True)
    runs[0].advance(steps)
    points, test = zip(*runs[0].points, strict=True)
    return Curve(runs[0].rate, points, test)


@dataclass(frozen=True)
class Comparison:
    """Predicted start against He initialisation, for one network and number of training images (0 for all).

    The seed is that of the order of the images and of He initialisation.
    """

    name: str
    images: int
    seed: int
    predicted: Curve
    he: Curve

    def gap(self, step: int) -> float:
        """Accuracy of the predicted side minus that of the He side after ``step`` steps of both."""
        return self.predicted.at(step) - self.he.at(step)

    def steps_saved(self, step: int) -> int:
        """Further steps that He initialisation needs to reach what the predicted side has after ``step`` steps.

        Negative where He is faster; where it does not get there at all, its whole length counts, so the mean is a
        lower bound.
        """
        needed = self.he.steps_to_reach(self.predicted.at(step))
        return (self.he.steps[-1] if needed is None else needed) - step


def small_training_set(images: ImageSet, count: int, *, seed: int) -> ImageSet:
    """A seeded random part of ``count`` images with equal shares of the classes, as far as they last."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    per_class = [order[images.labels[order] == label] for label in range(images.num_classes)]
    interleaved: list[torch.Tensor] = []
    for position in range(max(len(items) for items in per_class)):
        interleaved.extend(items[position : position + 1] for items in per_class if position < len(items))
        if len(interleaved) >= count:
            break
    return images.subset(torch.cat(interleaved)[:count])


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and its standard error (0 for a single value)."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return statistics.fmean(values), error
