"""The evaluation of a hypernetwork: zero-shot accuracy, the fine-tuning comparison, and the honesty check.

Every network is one job; jobs run in parallel processes with one thread each. What a job measures depends on the
network, the plan and the seeds alone, not on the number of processes.
"""

from __future__ import annotations

import logging
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ghn_service.errors import DataError, GhnServiceError
from ghn_service.hypernetwork.checkpoint import load_checkpoint
from ghn_service.hypernetwork.ghn import GraphHyperNetwork
from ghn_service.training.data import ImageSet, Normalization, measure_normalization, require_images, split_validation
from ghn_service.training.data_layouts import ImageFormat
from ghn_service.training.fine_tune import Comparison, FineTuneData, FineTunePlan, compare_starts, small_training_set
from ghn_service.training.memory import keep_freed_memory
from ghn_service.training.networks import Task, find_network, network_names
from ghn_service.training.novelty import PredictionLibrary
from ghn_service.training.sampling import TargetArchitecture
from ghn_service.training.trainer import choose_precision
from ghn_service.training.zero_shot import (
    batch_accuracy,
    he_module,
    load_tensors,
    predict_module,
    recalibrated_accuracy,
)

logger = logging.getLogger(__name__)
ALL_SPLITS = ("test", "wide", "deep", "dense", "bnfree", "reference")


@dataclass(frozen=True)
class EvaluationPlan:
    """What is measured.

    Attributes:
        splits: Splits of the generator, and ``reference`` for the registry's networks.
        networks: Networks per split.
        test_images: Test images for zero-shot accuracy.
        calibration_images: Training images for recalibrated BatchNorm.
        fine_tune_networks: Networks of split ``test`` in the fine-tuning comparison; 0 leaves it out.
        fine_tune_images: Sizes of the training sets; 0 stands for all images.
        fine_tune_test_images: Test images per point of a curve.
        validation_images: Held-out training images that choose learning rates.
        seeds: Seeds of the comparison.
        fine_tune: Budgets and grid.
        library: Training networks in the honesty check; 0 leaves it out.
        precision: Number format of fine-tuning passes; zero-shot accuracy is always measured in float32.
        largest_macs: Networks with more multiply-adds are left out, and counted as such.
    """

    splits: tuple[str, ...] = ALL_SPLITS
    networks: int = 50
    test_images: int = 2000
    calibration_images: int = 1280
    fine_tune_networks: int = 20
    fine_tune_images: tuple[int, ...] = (0, 1000)
    fine_tune_test_images: int = 1000
    validation_images: int = 1000
    seeds: tuple[int, ...] = (0,)
    fine_tune: FineTunePlan = field(default_factory=FineTunePlan)
    library: int = 32
    precision: str = "auto"
    largest_macs: float = 1.5e9


@dataclass(frozen=True)
class ZeroShot:
    """Scores of one network without training.

    Attributes:
        split: Where it comes from.
        name: Its number or name.
        batch: Accuracy with predicted weights, BatchNorm with statistics of the batch.
        recalibrated: Accuracy with predicted weights, BatchNorm recalibrated on training images.
        he_batch: Accuracy with He initialisation, BatchNorm with statistics of the batch.
        novelty: Median relative distance to the nearest training network's tensors; NaN where not measured.
        covered: Share of the values that have such a neighbour.
        copied: Accuracy (protocol ``batch``) with the nearest tensors in place of its own; NaN where not measured.
    """

    split: str
    name: str
    batch: float
    recalibrated: float
    he_batch: float
    novelty: float = float("nan")
    covered: float = float("nan")
    copied: float = float("nan")


@dataclass(frozen=True)
class FineTuned:
    """One fine-tuning comparison.

    Attributes:
        name: The network.
        images: Number of training images; 0 for all.
        seed: Seed of the data order and of He initialisation.
        comparison: Both curves.
    """

    name: str
    images: int
    seed: int
    comparison: Comparison


@dataclass(frozen=True)
class Evaluation:
    """Everything that was measured.

    Attributes:
        plan: What was asked for.
        zero_shot: One entry per network.
        fine_tuned: One entry per network, data size and seed.
        skipped: Networks left out: too expensive, or not made for this size of image.
        seconds: Wall-clock time.
    """

    plan: EvaluationPlan
    zero_shot: tuple[ZeroShot, ...]
    fine_tuned: tuple[FineTuned, ...]
    skipped: int
    seconds: float


@dataclass(frozen=True)
class _Job:
    split: str
    name: str
    kind: str
    images: int = 0
    seed: int = 0


@dataclass(frozen=True, eq=False)
class _Context:
    """What every job of a worker process needs."""

    hypernetwork: GraphHyperNetwork
    training: ImageSet
    validation: ImageSet
    test: ImageSet
    normalization: Normalization
    plan: EvaluationPlan
    library: PredictionLibrary | None

    def network(self, split: str, name: str) -> TargetArchitecture:
        sizes = Task(self.training.num_classes, self.training.channels, self.training.image_size)
        return find_network(split, name, sizes)

    def is_affordable(self, split: str, name: str) -> bool:
        """Whether the network runs on images of this size at a cost within the plan."""
        try:
            return self.network(split, name).multiply_adds <= self.plan.largest_macs
        except (GhnServiceError, RuntimeError) as error:
            logger.warning("network %s of split %s is left out: %s", name, split, error)
            return False


_context: _Context | None = None


def evaluate(
    checkpoint: Path, data_folder: Path, plan: EvaluationPlan, *, workers: int = 1, cache: Path | None = None
) -> Evaluation:
    """Measures a checkpoint.

    Args:
        checkpoint: File of ``ghn-train fit``.
        data_folder: Images with splits train and test.
        plan: What to measure.
        workers: Processes; each uses one thread.
        cache: Folder for decoded images.

    Raises:
        CheckpointError: The checkpoint cannot be read.
        DataError: The images cannot be read, or have another number of classes.
    """
    started = time.monotonic()
    context = _make_context(checkpoint, data_folder, plan, cache)
    jobs, skipped = _jobs(context)
    zero_shot: list[ZeroShot] = []
    fine_tuned: list[FineTuned] = []
    for number, result in enumerate(_run(jobs, (checkpoint, data_folder, plan, cache), workers), start=1):
        if isinstance(result, ZeroShot):
            zero_shot.append(result)
        else:
            fine_tuned.append(result)
        logger.info("%d of %d jobs after %.0f s: %s", number, len(jobs), time.monotonic() - started, _line(result))
    return Evaluation(plan, tuple(zero_shot), tuple(fine_tuned), skipped, time.monotonic() - started)


def _line(result: ZeroShot | FineTuned) -> str:
    """One result in short, so that a long evaluation that is cut off has not been for nothing."""
    if isinstance(result, ZeroShot):
        return f"{result.split}/{result.name} batch {result.batch:.3f} recalibrated {result.recalibrated:.3f}"
    predicted, he = result.comparison.predicted, result.comparison.he
    return f"{result.name} images {result.images or 'all'} predicted {predicted.test} He {he.test}"


def _make_context(checkpoint: Path, data_folder: Path, plan: EvaluationPlan, cache: Path | None) -> _Context:
    hypernetwork, summary = load_checkpoint(checkpoint)
    details = summary.card.details
    image_format = ImageFormat(details.get("image_size"), details.get("channels"))
    training = require_images(data_folder, "train", image_format=image_format, cache=cache)
    test = require_images(data_folder, "test", image_format=image_format, cache=cache)
    if training.num_classes != summary.config.num_classes:
        raise DataError(
            f"the checkpoint is for {summary.config.num_classes} classes, the data has {training.num_classes}"
        )
    training, validation = split_validation(training, min(5000, len(training) // 5))
    stored = details.get("normalization")
    normalization = (
        Normalization(tuple(stored["mean"]), tuple(stored["std"])) if stored else measure_normalization(training)
    )
    context = _Context(hypernetwork, training, validation, test, normalization, plan, None)
    if not plan.library:
        return context
    trained_on = (context.network("train", str(index)) for index in range(plan.library))
    library = PredictionLibrary(hypernetwork, trained_on)
    return _Context(hypernetwork, training, validation, test, normalization, plan, library)


def _jobs(context: _Context) -> tuple[list[_Job], int]:
    """All jobs, longest first, and the number of networks left out."""
    plan, skipped = context.plan, 0
    zero_shot: list[_Job] = []
    for split in plan.splits:
        for name in network_names(split, plan.networks):
            if not context.is_affordable(split, name):
                skipped += 1
            else:
                zero_shot.append(_Job(split, name, "zero-shot"))
    chosen = [job.name for job in zero_shot if job.split == "test"][: plan.fine_tune_networks]
    fine_tune = [
        _Job("test", name, "fine-tune", images, seed)
        for name in chosen
        for images in plan.fine_tune_images
        for seed in plan.seeds
    ]
    return fine_tune + zero_shot, skipped


def _run(
    jobs: Sequence[_Job], setup: tuple[Path, Path, EvaluationPlan, Path | None], workers: int
) -> Iterator[ZeroShot | FineTuned]:
    if workers <= 1:
        _start_worker(*setup)
        yield from map(_run_job, jobs)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start_worker, initargs=setup) as pool:
        yield from pool.map(_run_job, jobs)


def _start_worker(checkpoint: Path, data_folder: Path, plan: EvaluationPlan, cache: Path | None) -> None:
    global _context
    torch.set_num_threads(1)
    keep_freed_memory()
    _context = _make_context(checkpoint, data_folder, plan, cache)


def _run_job(job: _Job) -> ZeroShot | FineTuned:
    assert _context is not None, "the worker was started without its initializer"
    return _zero_shot(job, _context) if job.kind == "zero-shot" else _fine_tune(job, _context)


def _zero_shot(job: _Job, context: _Context) -> ZeroShot:
    architecture = context.network(job.split, job.name)
    plan, normalization = context.plan, context.normalization
    test = context.test.subset(torch.arange(min(plan.test_images, len(context.test))))
    calibration = context.training.subset(torch.arange(min(plan.calibration_images, len(context.training))))
    module = predict_module(context.hypernetwork, architecture, seed=0).eval()
    he = he_module(architecture, seed=0).eval()
    scores = {
        "batch": batch_accuracy(module, test, normalization),
        "recalibrated": recalibrated_accuracy(module, calibration, test, normalization),
        "he_batch": batch_accuracy(he, test, normalization),
    }
    if context.library is not None:
        novelty = context.library.novelty(architecture)
        load_tensors(module, novelty.copies)
        scores["novelty"], scores["covered"] = novelty.distance, novelty.covered
        scores["copied"] = batch_accuracy(module, test, normalization)
    return ZeroShot(job.split, job.name, **scores)


def _fine_tune(job: _Job, context: _Context) -> FineTuned:
    architecture = context.network(job.split, job.name)
    plan = context.plan
    training = context.training
    if job.images:
        training = small_training_set(training, job.images, seed=job.seed)
    data = FineTuneData(
        training,
        context.validation.subset(torch.arange(min(plan.validation_images, len(context.validation)))),
        context.test.subset(torch.arange(min(plan.fine_tune_test_images, len(context.test)))),
        context.normalization,
    )
    comparison = compare_starts(
        predict_module(context.hypernetwork, architecture, seed=job.seed),
        he_module(architecture, seed=job.seed),
        data,
        plan.fine_tune,
        seed=job.seed,
        precision=choose_precision(plan.precision, torch.device("cpu")),
    )
    return FineTuned(job.name, job.images, job.seed, comparison)
