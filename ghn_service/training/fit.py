"""Puts a training run together: data, networks, trainer, resume, checkpoint."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from ghn_service.errors import TrainingError
from ghn_service.hypernetwork.checkpoint import CheckpointSummary, ModelCard, load_checkpoint, save_checkpoint
from ghn_service.hypernetwork.config import GHNConfig, decode_config
from ghn_service.hypernetwork.ghn import GraphHyperNetwork
from ghn_service.postprocess.distribution_shift import METADATA_KEY
from ghn_service.training.data import (
    ImageSet,
    Normalization,
    load_images,
    measure_normalization,
    require_images,
    split_validation,
)
from ghn_service.training.data_layouts import ImageFormat
from ghn_service.training.distributed import Workers, join_workers
from ghn_service.training.graph_statistics import training_graph_statistics
from ghn_service.training.memory import keep_freed_memory
from ghn_service.training.networks import Pool, Task
from ghn_service.training.sampling import ArchitectureSource
from ghn_service.training.settings import TrainingSettings
from ghn_service.training.state import Progress, find_state, load_state
from ghn_service.training.trainer import Trainer
from ghn_service.training.zero_shot import make_validation

logger = logging.getLogger(__name__)
CHECKPOINT_FILE = "ghn.safetensors"


@dataclass(frozen=True, eq=False)
class TrainingData:
    """Images of a run.

    Attributes:
        training: Images to train on.
        validation: Images for validation and for choosing learning rates.
        normalization: Channel statistics of the training images.
    """

    training: ImageSet
    validation: ImageSet
    normalization: Normalization


def load_training_data(folder: Path, settings: TrainingSettings, cache: Path | None) -> TrainingData:
    """Training and validation images of a folder; the latter are held out where the folder has none.

    Raises:
        DataError: The folder has no training images, or a file is broken.
    """
    image_format = ImageFormat(settings.data.image_size, settings.data.channels)
    training = require_images(folder, "train", image_format=image_format, cache=cache)
    same = ImageFormat(training.image_size, training.channels)
    validation = load_images(folder, "validation", image_format=same, cache=cache)
    if validation is None:
        count = min(settings.data.validation_images, max(1, len(training) // 5))
        training, validation = split_validation(training, count)
    return TrainingData(training, validation, measure_normalization(training))


def fit_settings_to_data(settings: TrainingSettings, images: ImageSet) -> TrainingSettings:
    """The settings with the class count of the data."""
    hypernetwork = {**settings.hypernetwork, "num_classes": images.num_classes}
    return settings.model_copy(update={"hypernetwork": hypernetwork})


def fit(
    data_folder: Path,
    out: Path,
    settings: TrainingSettings,
    *,
    resume: str = "auto",
    start_from: Path | None = None,
    cache: Path | None = None,
    source: ArchitectureSource | None = None,
) -> Progress:
    """Trains a hypernetwork, or goes on with a run, and writes its checkpoint.

    Args:
        data_folder: Labelled images.
        out: Folder of the run.
        settings: The recipe.
        resume: ``auto`` goes on from the folder's state if there is one; ``never`` needs a folder without.
        start_from: Checkpoint or state whose weights a new run begins with; random ones where omitted.
        cache: Folder for decoded images; ``cache`` beside the run where omitted.
        source: Training networks by number; those of ``sampling.split`` where omitted.

    Raises:
        TrainingError: The run cannot start, be resumed, or keeps diverging.
        DataError: The data cannot be read.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    keep_freed_memory()
    with join_workers() as workers:
        data = load_training_data(data_folder, settings, cache or out.parent / "cache")
        settings = fit_settings_to_data(settings, data.training)
        trainer = _make_trainer(data, out, settings, workers, source)
        _begin(trainer, out, resume, start_from)
        progress = trainer.run()
        if workers.is_main:
            export_checkpoint(trainer, out / CHECKPOINT_FILE, data, data_folder.name)
        return progress


def _make_trainer(
    data: TrainingData,
    out: Path,
    settings: TrainingSettings,
    workers: Workers,
    source: ArchitectureSource | None,
) -> Trainer:
    task = Task(data.training.num_classes, data.training.channels, data.training.image_size)
    limits = settings.limits
    shown = data.validation.subset(torch.arange(min(limits.validation_images, len(data.validation))))
    validation = make_validation(
        source or Pool("val", task, limits.validation_networks),
        range(limits.validation_networks),
        shown,
        data.normalization,
    )
    return Trainer(
        settings,
        data.training,
        data.normalization,
        source or Pool(settings.sampling.split, task, settings.sampling.pool),
        out,
        workers,
        validation=validation,
    )


def _begin(trainer: Trainer, out: Path, resume: str, start_from: Path | None) -> None:
    """Random weights, those of another file, or the saved state of this run."""
    state = find_state(out)
    if state is not None:
        if resume == "never":
            raise TrainingError(f"{out} already holds a run; resume it, or choose an empty folder")
        trainer.restore(state)
        logger.info("resumed at step %d after %.0f s of training", state.progress.step, state.progress.elapsed_s)
    elif start_from is not None:
        config, tensors = _read_start(start_from)
        for name, before in dataclasses.asdict(config).items():
            if (now := getattr(trainer.config, name)) != before:
                logger.warning("hypernetwork.%s is %s; it was %s in %s", name, now, before, start_from.name)
        trainer.start_from(tensors)


def _read_start(file: Path) -> tuple[GHNConfig, dict[str, torch.Tensor]]:
    if file.suffix == ".safetensors":
        hypernetwork, _ = load_checkpoint(file)
        return hypernetwork.config, hypernetwork.state_dict()
    state = load_state(file)
    return decode_config(state.settings["hypernetwork"]), state.average


def export_checkpoint(trainer: Trainer, path: Path, data: TrainingData, dataset: str) -> CheckpointSummary:
    """Writes the averaged hypernetwork in half precision, with a card that says how it was made."""
    card = ModelCard(
        dataset=dataset,
        class_names=data.training.class_names,
        trained_on=f"{trainer.progress.networks} random networks of the generator's split "
        f"{trainer.settings.sampling.split}",
        protocol="images scaled to 0..1, then normalised with mean and std per channel (details.normalization)",
        details={
            "normalization": {"mean": data.normalization.mean, "std": data.normalization.std},
            "image_size": data.training.image_size,
            "channels": data.training.channels,
            "steps": trainer.progress.step,
            "hours": round(trainer.progress.elapsed_s / 3600, 3),
            "code_version": code_version(),
            "settings": trainer.settings.model_dump(mode="json"),
            METADATA_KEY: training_graph_statistics(trainer.stream.source, trainer.settings.sampling),
        },
    )
    return save_half(trainer.averaged(), path, card)


def save_half(hypernetwork: GraphHyperNetwork, path: Path, card: ModelCard) -> CheckpointSummary:
    """Writes a hypernetwork with its values in half precision; loading gives float32 again."""
    return save_checkpoint(hypernetwork.half(), path, card=card)


def code_version() -> str:
    """Version of the package, and the commit where it is run from a clone."""
    version = importlib.metadata.version("ghn-service")
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return version
    return f"{version} ({commit})"
