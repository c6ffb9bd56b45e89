"""The single measurements of an evaluation, and what they need.

What a job measures depends on the checkpoint, the network, the plan and the seeds alone, not on the number of processes
or on interruptions.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from ghn_architectures.generator import GENERATOR_VERSION
from ghn_service.errors import DataError, GhnServiceError
from ghn_service.hypernetwork.checkpoint import CheckpointSummary, load_checkpoint
from ghn_service.hypernetwork.ghn import GraphHyperNetwork
from ghn_service.training.data import ImageSet, Normalization, measure_normalization, require_images, split_validation
from ghn_service.training.data_layouts import ImageFormat
from ghn_service.training.evaluation_plan import EvaluationPlan, Job
from ghn_service.training.fine_tune import Curve, FineTuneData, fine_tune, small_training_set
from ghn_service.training.memory import keep_freed_memory
from ghn_service.training.networks import REFERENCE, Task, find_network, reference_names
from ghn_service.training.novelty import KnownPredictions
from ghn_service.training.passes import target_passes
from ghn_service.training.results import Result, ZeroShot, result_key
from ghn_service.training.sampling import TargetArchitecture
from ghn_service.training.trainer import choose_precision
from ghn_service.training.training_pool import TrainingPool, pool_split
from ghn_service.training.zero_shot import (
    batch_accuracy,
    he_module,
    load_tensors,
    predict_module,
    recalibrated_accuracy,
)

logger = logging.getLogger(__name__)
MOST_CANDIDATES = 20  # times the networks wanted
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Setup:
    """Where the parts of an evaluation come from; enough for a worker process to begin.

    Attributes:
        checkpoint: File of ``ghn-train fit``.
        data_folder: Images with splits train and test.
        plan: What to measure.
        cache: Folder for decoded images and digests of training networks.
    """

    checkpoint: Path
    data_folder: Path
    plan: EvaluationPlan
    cache: Path | None


@dataclass(frozen=True, eq=False)
class Context:
    """What every job of a process needs."""

    hypernetwork: GraphHyperNetwork
    summary: CheckpointSummary
    training: ImageSet
    validation: ImageSet
    test: ImageSet
    normalization: Normalization
    plan: EvaluationPlan

    @property
    def task(self) -> Task:
        """Sizes of the networks' input and output."""
        return Task(self.training.num_classes, self.training.channels, self.training.image_size)

    @functools.cached_property
    def neighbours(self) -> KnownPredictions | None:
        """Predictions for training networks."""
        if not self.plan.novelty_networks:
            return None
        split = pool_split(self.summary.card.details)
        trained_on = (self.network(split, str(index)) for index in range(self.plan.novelty_networks))
        return KnownPredictions(self.hypernetwork, trained_on)

    @property
    def precision(self) -> torch.dtype:
        """Number format of fine-tuning."""
        return choose_precision(self.plan.precision, CPU)

    def network(self, split: str, name: str) -> TargetArchitecture:
        """The network ``name`` of a split."""
        return find_network(split, name, self.task)

    def is_affordable(self, split: str, name: str) -> bool:
        """Whether the network runs on images of this size at a cost within the plan."""
        try:
            return self.network(split, name).multiply_adds <= self.plan.largest_macs
        except (GhnServiceError, RuntimeError) as error:
            logger.warning("network %s of split %s is left out: %s", name, split, error)
            return False

    def key(self, job: Job) -> str:
        """A name for the job's result that changes with everything it depends on."""
        is_zero_shot = job.kind == "zero-shot"
        precision = str(self.precision)
        return result_key(
            checkpoint=None if job.kind == "he" else self.summary.digest,
            data=[len(self.training), len(self.test), self.training.image_size, self.training.channels],
            classes=list(self.training.class_names),
            normalization=[round(value, 4) for value in (*self.normalization.mean, *self.normalization.std)],
            generator=GENERATOR_VERSION,
            job=[job.kind, job.split, job.name, job.images, job.seed],
            protocol=self.plan.zero_shot_protocol()
            if is_zero_shot
            else self.plan.fine_tune_protocol(precision=precision),
        )


@dataclass(frozen=True)
class Selection:
    """The networks to measure.

    Attributes:
        names: Names per split.
        skipped: Networks left out for their cost.
        in_pool: Per split, networks left out because training used the same graph.
    """

    names: dict[str, tuple[str, ...]]
    skipped: int
    in_pool: dict[str, int]


def make_context(setup: Setup) -> Context:
    """Reads checkpoint and images.

    Raises:
        CheckpointError: The checkpoint cannot be read.
        DataError: The images cannot be read, or have another number of classes.
    """
    hypernetwork, summary = load_checkpoint(setup.checkpoint)
    details = summary.card.details
    image_format = ImageFormat(details.get("image_size"), details.get("channels"))
    training = require_images(setup.data_folder, "train", image_format=image_format, cache=setup.cache)
    test = require_images(setup.data_folder, "test", image_format=image_format, cache=setup.cache)
    if training.num_classes != summary.config.num_classes:
        raise DataError(
            f"the checkpoint is for {summary.config.num_classes} classes, the data has {training.num_classes}"
        )
    training, validation = split_validation(training, min(5000, len(training) // 5))
    stored = details.get("normalization")
    normalization = (
        Normalization(tuple(stored["mean"]), tuple(stored["std"])) if stored else measure_normalization(training)
    )
    return Context(hypernetwork, summary, training, validation, test, normalization, setup.plan)


def select_networks(context: Context, pool: TrainingPool) -> Selection:
    """The first networks of each split that can be measured and that training has not seen."""
    names: dict[str, tuple[str, ...]] = {}
    in_pool: dict[str, int] = {}
    skipped = 0
    for split, wanted in context.plan.splits.items():
        chosen: list[str] = []
        for name in _candidates(split, wanted):
            if len(chosen) == wanted:
                break
            if not context.is_affordable(split, name):
                skipped += 1
            elif split != REFERENCE and context.network(split, name).graph().digest() in pool.digests:
                in_pool[split] = in_pool.get(split, 0) + 1
            else:
                chosen.append(name)
        names[split] = tuple(chosen)
    return Selection(names, skipped, in_pool)


def _candidates(split: str, wanted: int) -> Iterable[str]:
    return reference_names() if split == REFERENCE else map(str, range(MOST_CANDIDATES * wanted))


def start_process(setup: Setup) -> Context:
    """Prepares a worker process."""
    torch.set_num_threads(1)
    keep_freed_memory()
    return make_context(setup)


def measure(context: Context, task: tuple[Job, float | None]) -> Result:
    """Does one job.

    Args:
        context: What the process has.
        task: The job, and the learning rate of fine-tuning where it is chosen already.
    """
    job, learning_rate = task
    return _zero_shot(job, context) if job.kind == "zero-shot" else _fine_tune(job, learning_rate, context)


def first_images(images: ImageSet, count: int) -> ImageSet:
    """The first ``count`` images, as far as there are so many."""
    return images.subset(torch.arange(min(count, len(images))))


def _zero_shot(job: Job, context: Context) -> ZeroShot:
    architecture = context.network(job.split, job.name)
    plan, normalization = context.plan, context.normalization
    test = first_images(context.test, plan.test_images)
    calibration = first_images(context.training, plan.calibration_images)
    module = predict_module(context.hypernetwork, architecture, seed=0).eval()
    he = he_module(architecture, seed=0).eval()
    novelty = context.neighbours.novelty(architecture) if context.neighbours else None
    with target_passes(CPU, choose_precision(plan.zero_shot_precision, CPU)):
        scores = {
            "batch": batch_accuracy(module, test, normalization),
            "recalibrated": recalibrated_accuracy(module, calibration, test, normalization),
            "he_batch": batch_accuracy(he, test, normalization),
        }
        if novelty is not None:
            load_tensors(module, novelty.copies)
            scores["novelty"], scores["covered"] = novelty.distance, novelty.covered
            scores["copied"] = batch_accuracy(module, test, normalization)
    return ZeroShot(job.split, job.name, **scores)


def _fine_tune(job: Job, learning_rate: float | None, context: Context) -> Curve:
    architecture, plan = context.network(job.split, job.name), context.plan
    training = context.training
    if job.images:
        training = small_training_set(training, job.images, seed=job.seed)
    data = FineTuneData(
        training,
        first_images(context.validation, plan.validation_images),
        first_images(context.test, plan.fine_tune_test_images),
        context.normalization,
    )
    budget = max(plan.fine_tune.budgets)
    if job.kind == "he":
        module, steps = he_module(architecture, seed=job.seed), max(budget, plan.fine_tune.longest)
    else:
        module, steps = predict_module(context.hypernetwork, architecture, seed=job.seed), budget
    return fine_tune(
        module,
        data,
        plan.fine_tune,
        steps=steps,
        seed=job.seed,
        precision=context.precision,
        learning_rate=learning_rate,
    )
