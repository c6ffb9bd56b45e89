"""Puts a training run together: data, networks, trainer, resume, checkpoint."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
import subprocess
from pathlib import Path

import torch

from ghn_architectures.architecture import Interface
from ghn_client.finetune.images import measure_normalization
from ghn_service.errors import TrainingError
from ghn_service.hypernetwork.checkpoint import CheckpointSummary, ModelCard, load_checkpoint, save_checkpoint
from ghn_service.hypernetwork.config import decode_config
from ghn_service.training.distributed import Workers, join_workers
from ghn_service.training.evaluation.zero_shot import make_validation
from ghn_service.training.images import interface_of, load_training_data
from ghn_service.training.networks import ArchitectureSource, DrawnPool, NetworkStream, Pool, training_pools
from ghn_service.training.precision import keep_freed_memory
from ghn_service.training.settings import SamplingSettings, TrainingSettings
from ghn_service.training.state import Progress, find_state, load_state
from ghn_service.training.trainer import Trainer
from ghn_service.trust import METADATA_KEY, encode_statistics, summarize_graphs

logger = logging.getLogger(__name__)


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
    """Trains a hypernetwork, or goes on with a run, and writes its checkpoint into the folder ``out``.

    ``resume`` is ``auto``, to go on from the folder's state if there is one, or ``never``, which needs a folder
    without. A new run begins with the weights of ``start_from``, a checkpoint or state, or with random ones. Decoded
    images are kept in ``cache``, or beside the run. ``source`` takes the place of the networks of ``sampling.split``.

    Raises:
        TrainingError: The run cannot start, be resumed, or keeps diverging.
        DataError: The data cannot be read.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    keep_freed_memory()
    with join_workers() as workers:
        training, validation = load_training_data(data_folder, settings.data, cache or out.parent / "cache")
        normalization = measure_normalization(training)
        hypernetwork = {**settings.hypernetwork, "num_classes": training.num_classes}
        settings = settings.model_copy(update={"hypernetwork": hypernetwork})
        interface, limits = interface_of(training), settings.limits
        validate = make_validation(
            source or Pool("val", interface, limits.validation_networks),
            range(limits.validation_networks),
            validation.first(limits.validation_images),
            normalization,
        )
        source = source or _training_pool(settings, interface, cache or out.parent / "cache", workers)
        trainer = Trainer(settings, training, normalization, source, out, workers, validation=validate)
        _begin(trainer, out, resume, start_from)
        progress = trainer.run()
        if workers.is_main:
            _export_checkpoint(trainer, out / "ghn.safetensors", data_folder.name)
        return progress


def _training_pool(
    settings: TrainingSettings, interface: Interface, cache: Path, workers: Workers
) -> ArchitectureSource:
    """The networks to train on; with ``limits.draw_first`` the main process draws them and the others read its file."""
    pool = Pool(settings.sampling.split, interface, settings.sampling.pool)
    if not settings.limits.draw_first:
        return pool
    if workers.is_main:
        DrawnPool(pool, cache)
    workers.wait()
    return DrawnPool(pool, cache)


def _begin(trainer: Trainer, out: Path, resume: str, start_from: Path | None) -> None:
    """Random weights, those of another file, or the saved state of this run."""
    state = find_state(out)
    if state is not None:
        if resume == "never":
            raise TrainingError(f"{out} already holds a run; resume it, or choose an empty folder")
        trainer.restore(state)
        logger.info("resumed at step %d after %.0f s of training", state.progress.step, state.progress.elapsed_s)
    elif start_from is not None:
        if start_from.suffix == ".safetensors":
            hypernetwork, summary = load_checkpoint(start_from)
            config, tensors, details = hypernetwork.config, hypernetwork.state_dict(), summary.card.details
            trained_on = training_pools(details.get("settings", {}), details.get("earlier_pools", {}))
        else:
            other = load_state(start_from)
            config, tensors = decode_config(other.settings["hypernetwork"]), other.average
            trained_on = training_pools(other.settings, other.earlier_pools)
        for name, before in dataclasses.asdict(config).items():
            if (now := getattr(trainer.config, name)) != before:
                logger.warning("hypernetwork.%s is %s; it was %s in %s", name, now, before, start_from.name)
        trainer.start_from(tensors, trained_on)


def _export_checkpoint(trainer: Trainer, path: Path, dataset: str) -> CheckpointSummary:
    """Writes the averaged hypernetwork in half precision, with a card that says how it was made."""
    images, normalization = trainer.batches.images, trainer.batches.normalization
    card = ModelCard(
        dataset=dataset,
        class_names=images.class_names,
        trained_on=f"{trainer.progress.networks} random networks of the generator's split "
        f"{trainer.settings.sampling.split}",
        protocol="images scaled to 0..1, then normalised with mean and std per channel (details.normalization)",
        details={
            "normalization": {"mean": normalization.mean, "std": normalization.std},
            "image_size": images.image_size,
            "channels": images.channels,
            "steps": trainer.progress.step,
            "hours": round(trainer.progress.elapsed_s / 3600, 3),
            "code_version": _code_version(),
            "settings": trainer.settings.model_dump(mode="json"),
            "earlier_pools": trainer.earlier_pools,
            METADATA_KEY: graph_statistics(trainer.stream.source, trainer.settings.sampling),
        },
    )
    return save_checkpoint(trainer.averaged().half(), path, card=card)


def graph_statistics(source: ArchitectureSource, settings: SamplingSettings, *, num_graphs: int = 128) -> str:
    """Statistics of the networks that the end of training sees, so that reports can tell how far a graph is."""
    stream = NetworkStream(source, settings, seed=1)
    return encode_statistics(summarize_graphs(item.graph() for _, item in stream.take(num_graphs, 1.0)))


def _code_version() -> str:
    """Version of the package, and the commit where it is run from a clone."""
    version = importlib.metadata.version("ghn-service")
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return version
    return f"{version} ({commit})"
