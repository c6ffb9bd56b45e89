"""The single measurements of an evaluation, what they need, and which networks they are made on.

What a job measures depends on the checkpoint, the network, the settings and the seeds alone, not on the number of
processes or on interruptions. Small families of random networks repeat: a network of split ``test`` may be the same
graph as one that training used, so digests of those are computed once and kept.
"""

from __future__ import annotations

import functools
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from ghn_architectures.architecture import Architecture
from ghn_architectures.generator import GENERATOR_VERSION
from ghn_architectures.registry import ARCHITECTURES
from ghn_client.atomic_file import write_file
from ghn_client.finetune.images import ImageSet, Normalization, measure_normalization
from ghn_service.errors import DataError, GhnServiceError
from ghn_service.graph.architecture import DIGEST_VERSION
from ghn_service.hypernetwork.checkpoint import CheckpointSummary, load_checkpoint
from ghn_service.hypernetwork.ghn import GraphHyperNetwork
from ghn_service.training.evaluation.fine_tune import Curve, FineTuneData, fine_tune, small_training_set
from ghn_service.training.evaluation.likeness import layers_and_width, likeness
from ghn_service.training.evaluation.results import Result, ZeroShot, result_key
from ghn_service.training.evaluation.settings import EvaluationSettings, Job
from ghn_service.training.evaluation.zero_shot import (
    KnownPredictions,
    batch_accuracy,
    he_module,
    load_tensors,
    predict_module,
    recalibrated_accuracy,
)
from ghn_service.training.images import interface_of, require_split, split_validation
from ghn_service.training.networks import REFERENCE, Pool, find_candidate, find_network, multiply_adds
from ghn_service.training.precision import choose_precision, keep_freed_memory, target_passes

logger = logging.getLogger(__name__)
MOST_CANDIDATES = 20  # times the networks wanted
SAVE_EVERY = 250
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Setup:
    """Where the parts of an evaluation come from; enough for a worker process to begin.

    Attributes:
        checkpoint: File of ``ghn-train fit``.
        data_folder: Images with splits train and test.
        settings: What to measure.
        cache: Folder for decoded images and digests of training networks.
    """

    checkpoint: Path
    data_folder: Path
    settings: EvaluationSettings
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
    settings: EvaluationSettings

    @functools.cached_property
    def neighbours(self) -> KnownPredictions | None:
        """Predictions for training networks."""
        if not self.settings.novelty_networks:
            return None
        split = self.trained_on.split
        known = (self.network(split, str(index)) for index in range(self.settings.novelty_networks))
        return KnownPredictions(self.hypernetwork, known)

    @property
    def trained_on(self) -> Pool:
        """The networks that the checkpoint was trained on, as its card says; of size 0 where it does not."""
        sampling = self.summary.card.details.get("settings", {}).get("sampling", {})
        return Pool(str(sampling.get("split", "train")), interface_of(self.training), int(sampling.get("pool", 0)))

    @property
    def precision(self) -> torch.dtype:
        """Number format of fine-tuning."""
        return choose_precision(self.settings.precision, CPU)

    def network(self, split: str, name: str) -> Architecture:
        """The network ``name`` of a split."""
        return find_network(split, name, interface_of(self.training))

    def is_affordable(self, split: str, name: str) -> bool:
        """Whether the network runs on images of this size at a cost within the plan."""
        try:
            return multiply_adds(self.network(split, name)) <= self.settings.largest_macs
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
            protocol=self.settings.zero_shot_protocol()
            if is_zero_shot
            else self.settings.fine_tune_protocol(precision=precision),
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
    image_format = {"image_size": details.get("image_size"), "channels": details.get("channels")}
    training, test = (
        require_split(setup.data_folder, split, **image_format, cache=setup.cache) for split in ("train", "test")
    )
    if training.num_classes != summary.config.num_classes:
        raise DataError(
            f"the checkpoint is for {summary.config.num_classes} classes, the data has {training.num_classes}"
        )
    training, validation = split_validation(training, min(5000, len(training) // 5))
    stored = details.get("normalization")
    normalization = (
        Normalization(tuple(stored["mean"]), tuple(stored["std"])) if stored else measure_normalization(training)
    )
    return Context(hypernetwork, summary, training, validation, test, normalization, setup.settings)


def select_networks(context: Context, trained_on: frozenset[str]) -> Selection:
    """The first networks of each split that can be measured and whose digests training has not seen."""
    names: dict[str, tuple[str, ...]] = {}
    in_pool: dict[str, int] = {}
    skipped = 0
    for split, wanted in context.settings.splits.items():
        chosen: list[str] = []
        for name in ARCHITECTURES if split == REFERENCE else map(str, range(MOST_CANDIDATES * wanted)):
            if len(chosen) == wanted:
                break
            if not context.is_affordable(split, name):
                skipped += 1
            elif split != REFERENCE and context.network(split, name).graph().digest() in trained_on:
                in_pool[split] = in_pool.get(split, 0) + 1
            else:
                chosen.append(name)
        names[split] = tuple(chosen)
    return Selection(names, skipped, in_pool)


def training_digests(pool: Pool, cache: Path | None) -> frozenset[str]:
    """Digests of the graphs that a checkpoint was trained on, from the cache as far as it has them.

    About 20 ms of processor time per network; progress is kept, so an interruption costs a few seconds.

    Args:
        pool: The training networks.
        cache: Folder for digests; nothing is kept where omitted.
    """
    sizes = f"{pool.interface.num_classes}-{pool.interface.in_channels}-{pool.interface.image_size}"
    path = cache / f"graphs-{pool.split}-v{GENERATOR_VERSION}.{DIGEST_VERSION}-{sizes}.json" if cache else None
    digests: list[str] = []
    if path and path.is_file():
        try:
            digests = [str(item) for item in json.loads(path.read_text(encoding="utf-8"))]
        except (OSError, ValueError, TypeError) as error:
            logger.warning("ignoring a broken cache file %s: %s", path.name, error)
    if len(digests) < pool.size:
        logger.info("digests of the training networks: %d of %d are known", len(digests), pool.size)
    for index in range(len(digests), pool.size):
        candidate = find_candidate(pool, index)
        digests.append(candidate.graph().digest() if candidate else "")
        if path and (len(digests) % SAVE_EVERY == 0 or len(digests) == pool.size):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, json.dumps(digests))
    return frozenset(digests[: pool.size]) - {""}


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


def _zero_shot(job: Job, context: Context) -> ZeroShot:
    architecture = context.network(job.split, job.name)
    settings, normalization = context.settings, context.normalization
    test = context.test.first(settings.test_images)
    calibration = context.training.first(settings.calibration_images)
    module = predict_module(context.hypernetwork, architecture, seed=0).eval()
    he = he_module(architecture, seed=0).eval()
    novelty = context.neighbours.novelty(architecture) if context.neighbours else None
    graph = architecture.graph()
    layers, width = layers_and_width(graph)
    shape = {"layers": layers, "width": width, "likeness": likeness(graph, dict(module.named_parameters()))}
    with target_passes(CPU, choose_precision(settings.zero_shot_precision, CPU)):
        scores = {
            "batch": batch_accuracy(module, test, normalization),
            "recalibrated": recalibrated_accuracy(module, calibration, test, normalization),
            "he_batch": batch_accuracy(he, test, normalization),
        }
        if novelty is not None:
            load_tensors(module, novelty.copies)
            scores["novelty"], scores["covered"] = novelty.distance, novelty.covered
            scores["copied"] = batch_accuracy(module, test, normalization)
    return ZeroShot(job.split, job.name, **scores, **shape)


def _fine_tune(job: Job, learning_rate: float | None, context: Context) -> Curve:
    architecture, settings = context.network(job.split, job.name), context.settings
    training = context.training
    if job.images:
        training = small_training_set(training, job.images, seed=job.seed)
    data = FineTuneData(
        training,
        context.validation.first(settings.validation_images),
        context.test.first(settings.fine_tune_test_images),
        context.normalization,
    )
    budget = max(settings.fine_tune.budgets)
    if job.kind == "he":
        module, steps = he_module(architecture, seed=job.seed), max(budget, settings.fine_tune.longest)
    else:
        module, steps = predict_module(context.hypernetwork, architecture, seed=job.seed), budget
    return fine_tune(
        module,
        data,
        settings.fine_tune,
        steps=steps,
        seed=job.seed,
        precision=context.precision,
        learning_rate=learning_rate,
    )
