"""The single measurements of an evaluation, what they need, and which networks they are made on.

A result depends on the checkpoint, the network, the settings and the seeds alone, not on the number of processes or on
interruptions. Small families of random networks repeat: a network of split ``test`` may be the same
graph as one that training used, so digests of those are computed once and kept.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ghn_architectures.architecture import Architecture
from ghn_architectures.generator import GENERATOR_VERSION
from ghn_architectures.registry import ARCHITECTURES
from ghn_client.atomic_file import write_file
from ghn_client.finetune.images import Normalization, measure_normalization
from ghn_service.errors import DataError, GhnServiceError
from ghn_service.graph.architecture import DIGEST_VERSION
from ghn_service.hypernetwork.checkpoint import CheckpointSummary, load_checkpoint
from ghn_service.hypernetwork.ghn import GraphHyperNetwork
from ghn_service.training.evaluation.fine_tune import FineTuneData, FineTuneSettings, fine_tune, small_training_set
from ghn_service.training.evaluation.results import Result, ZeroShot, result_key
from ghn_service.training.evaluation.zero_shot import (
    KnownPredictions,
    batch_accuracy,
    he_module,
    layers_and_width,
    likeness,
    load_tensors,
    predict_module,
    recalibrated_accuracy,
)
from ghn_service.training.images import digest_images, interface_of, load_training_data, require_split
from ghn_service.training.networks import REFERENCE, Pool, find_candidate, find_network, multiply_adds, training_pools
from ghn_service.training.precision import choose_precision, keep_freed_memory, target_passes
from ghn_service.training.settings import DataSettings

logger = logging.getLogger(__name__)
MOST_CANDIDATES = 20  # times the networks wanted
SAVE_EVERY = 250
CPU = torch.device("cpu")


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured; the options of ``ghn-train evaluate`` say what they set here, these are the others.

    Attributes:
        calibration_images: Training images for recalibrated BatchNorm.
        fine_tune_test_images: Test images per point of a curve.
        validation_images: Images that choose learning rates, with the first of the seeds; training left them out.
        precision: Number format of fine-tuning passes.
    """

    splits: Mapping[str, int]
    test_images: int = 2000
    calibration_images: int = 1280
    fine_tune_networks: int = 20
    fine_tune_images: tuple[int, ...] = (0, 1000)
    fine_tune_test_images: int = 1000
    validation_images: int = 1000
    seeds: tuple[int, ...] = (0,)
    fine_tune: FineTuneSettings = field(default_factory=FineTuneSettings)
    novelty_networks: int = 32
    precision: str = "auto"
    zero_shot_precision: str = "float32"
    largest_macs: float = 1.5e9
    is_baseline_only: bool = False


@dataclass(frozen=True)
class Measurement:
    """One thing to measure.

    Attributes:
        kind: ``zero-shot``, or the side of the comparison: ``predicted`` or ``he``.
        split: Split of the network.
        name: Its number or name.
        images: Training images (fine-tuning); 0 for all.
        seed: Seed (fine-tuning).
    """

    kind: str
    split: str
    name: str
    images: int = 0
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Context:
    """What every measurement of a process needs."""

    hypernetwork: GraphHyperNetwork
    summary: CheckpointSummary
    data: FineTuneData
    settings: EvaluationSettings

    @functools.cached_property
    def neighbours(self) -> KnownPredictions | None:
        """Predictions for training networks."""
        if not self.settings.novelty_networks:
            return None
        split = self.trained_on[0].split
        known = (self.network(split, str(index)) for index in range(self.settings.novelty_networks))
        return KnownPredictions(self.hypernetwork, known)

    @property
    def num_images(self) -> dict[str, int]:
        """Images for training, validation and test."""
        return {name: len(getattr(self.data, name)) for name in ("training", "validation", "test")}

    @functools.cached_property
    def _image_digests(self) -> list[str]:
        """Digests of all images: data sets of equal sizes and classes have results of their own."""
        return [digest_images(part) for part in (self.data.training, self.data.validation, self.data.test)]

    @property
    def trained_on(self) -> tuple[Pool, ...]:
        """The networks that the checkpoint was trained on, as its card says; of size 0 where it does not.

        First those of its own run, then those of the runs before, whose weights it began with.
        """
        details, interface = self.summary.card.details, interface_of(self.data.training)
        pools = training_pools(details.get("settings", {}), details.get("earlier_pools", {}))
        return tuple(Pool(split, interface, size) for split, size in pools.items())

    def network(self, split: str, name: str) -> Architecture:
        """The network ``name`` of a split."""
        return find_network(split, name, interface_of(self.data.training))

    def key(self, item: Measurement) -> str:
        """A name for the result that changes with everything it depends on."""
        normalization, settings = self.data.normalization, self.settings
        if item.kind == "zero-shot":
            protocol: dict[str, Any] = {
                "test_images": settings.test_images,
                "calibration_images": settings.calibration_images,
                "novelty_networks": settings.novelty_networks,
                "precision": settings.zero_shot_precision,
            }
        else:
            protocol = {
                **asdict(settings.fine_tune),
                "test_images": settings.fine_tune_test_images,
                "validation_images": settings.validation_images,
                "rates_of_seed": settings.seeds[0],
                "precision": str(choose_precision(settings.precision, CPU)),
            }
        return result_key(
            checkpoint=None if item.kind == "he" else self.summary.digest,
            data=self._image_digests,
            classes=list(self.data.training.class_names),
            normalization=[round(value, 4) for value in (*normalization.mean, *normalization.std)],
            generator=GENERATOR_VERSION,
            job=list(vars(item).values()),
            protocol=protocol,
        )


def make_context(checkpoint: Path, data_folder: Path, settings: EvaluationSettings, cache: Path | None) -> Context:
    """Prepares a process, which uses one thread: reads checkpoint and images.

    Raises:
        CheckpointError: The checkpoint cannot be read.
        DataError: The images cannot be read, or have another number of classes.
    """
    torch.set_num_threads(1)
    keep_freed_memory()
    hypernetwork, summary = load_checkpoint(checkpoint)
    details = summary.card.details
    image_format: dict[str, Any] = {"image_size": details.get("image_size"), "channels": details.get("channels")}
    held_out = details.get("settings", {}).get("data", {}).get("validation_images", DataSettings().validation_images)
    data_settings = DataSettings(**image_format, validation_images=held_out)
    training, validation = load_training_data(data_folder, data_settings, cache)
    test = require_split(data_folder, "test", **image_format, cache=cache)
    if training.num_classes != summary.config.num_classes:
        raise DataError(
            f"the checkpoint is for {summary.config.num_classes} classes, the data has {training.num_classes}"
        )
    stored = details.get("normalization")
    normalization = (
        Normalization(tuple(stored["mean"]), tuple(stored["std"])) if stored else measure_normalization(training)
    )
    return Context(hypernetwork, summary, FineTuneData(training, validation, test, normalization), settings)


def select_networks(
    context: Context, trained_on: Collection[str]
) -> tuple[dict[str, tuple[str, ...]], int, dict[str, int]]:
    """The first networks of each split that can be measured and whose digests training has not seen.

    Returns:
        Names per split; how many were left out for their cost; per split, how many because training used the graph.
    """
    names: dict[str, tuple[str, ...]] = {}
    in_pool: dict[str, int] = {}
    skipped = 0
    for split, wanted in context.settings.splits.items():
        chosen: list[str] = []
        for name in ARCHITECTURES if split == REFERENCE else map(str, range(MOST_CANDIDATES * wanted)):
            if len(chosen) == wanted:
                break
            try:
                network = context.network(split, name)
                is_affordable = multiply_adds(network) <= context.settings.largest_macs
            except (GhnServiceError, RuntimeError) as error:
                logger.warning("network %s of split %s is left out: %s", name, split, error)
                is_affordable = False
            if not is_affordable:
                skipped += 1
            elif split != REFERENCE and network.graph().digest() in trained_on:
                in_pool[split] = in_pool.get(split, 0) + 1
            else:
                chosen.append(name)
        names[split] = tuple(chosen)
    return names, skipped, in_pool


def training_digests(pool: Pool, cache: Path | None, deadline: float = math.inf) -> tuple[str, ...]:
    """Digests of the graphs that a checkpoint was trained on, from the cache as far as it has them.

    About 20 ms of processor time per network, so none is computed after ``deadline`` (``time.monotonic()``): fewer than
    ``pool.size`` come back where time did not suffice. Progress is kept, so an interruption costs a few seconds. A
    network that cannot be made has the digest "".
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
    while len(digests) < pool.size and time.monotonic() < deadline:
        candidate = find_candidate(pool, len(digests))
        digests.append(candidate.graph().digest() if candidate else "")
        if path and (len(digests) % SAVE_EVERY == 0 or len(digests) == pool.size):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, json.dumps(digests))
    return tuple(digests[: pool.size])


def measure(context: Context, task: tuple[Measurement, float | None]) -> Result:
    """Measures one thing; the second part of the task is the rate of fine-tuning where it is chosen already."""
    item, learning_rate = task
    if item.kind == "zero-shot":
        return _zero_shot(item, context)
    data, settings = context.data, context.settings
    training = small_training_set(data.training, item.images, seed=item.seed) if item.images else data.training
    part = FineTuneData(
        training,
        data.validation.first(settings.validation_images),
        data.test.first(settings.fine_tune_test_images),
        data.normalization,
    )
    architecture = context.network(item.split, item.name)
    steps = max(settings.fine_tune.budgets)
    if item.kind == "he":
        module, steps = he_module(architecture, seed=item.seed), max(steps, settings.fine_tune.longest)
    else:
        module = predict_module(context.hypernetwork, architecture, seed=item.seed)
    precision = choose_precision(settings.precision, CPU)
    return fine_tune(
        module, part, settings.fine_tune, steps=steps, seed=item.seed, precision=precision, learning_rate=learning_rate
    )


def _zero_shot(item: Measurement, context: Context) -> ZeroShot:
    architecture = context.network(item.split, item.name)
    settings, normalization = context.settings, context.data.normalization
    test = context.data.test.first(settings.test_images)
    calibration = context.data.training.first(settings.calibration_images)
    module = predict_module(context.hypernetwork, architecture, seed=0).eval()
    he = he_module(architecture, seed=0).eval()
    novelty = context.neighbours.novelty(architecture) if context.neighbours else None
    graph = architecture.graph()
    layers, width = layers_and_width(graph)
    scores = {"layers": layers, "width": width, "likeness": likeness(graph, dict(module.named_parameters()))}
    with target_passes(CPU, choose_precision(settings.zero_shot_precision, CPU)):
        scores["batch"] = batch_accuracy(module, test, normalization)
        scores["recalibrated"] = recalibrated_accuracy(module, calibration, test, normalization)
        scores["he_batch"] = batch_accuracy(he, test, normalization)
        if novelty is not None:
            load_tensors(module, novelty.copies)
            scores["novelty"], scores["covered"] = novelty.distance, novelty.covered
            scores["copied"] = batch_accuracy(module, test, normalization)
    return ZeroShot(item.split, item.name, **scores)
