"""What the training architectures look like, stored in the checkpoint so that reports can tell how far a graph is."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ghn_service.errors import TrainingError
from ghn_service.hypernetwork.checkpoint import CheckpointSummary, load_checkpoint, save_checkpoint
from ghn_service.postprocess.distribution_shift import METADATA_KEY, encode_statistics, summarize_graphs
from ghn_service.training.networks import Pool, Task
from ghn_service.training.sampling import ArchitectureSource, NetworkStream
from ghn_service.training.settings import SamplingSettings, TrainingSettings

NUM_GRAPHS = 128


def training_graph_statistics(
    source: ArchitectureSource, settings: SamplingSettings, *, num_graphs: int = NUM_GRAPHS
) -> str:
    """Statistics of networks as the end of training sees them, as the text that a checkpoint's card keeps.

    Args:
        source: Training networks by number.
        settings: How training chooses among them.
        num_graphs: How many to look at.
    """
    stream = NetworkStream(source, settings, seed=1)
    return encode_statistics(summarize_graphs(item.graph() for _, item in stream.take(num_graphs, 1.0)))


def add_graph_statistics(path: Path, *, num_graphs: int = NUM_GRAPHS) -> CheckpointSummary:
    """Adds the statistics to the card of a checkpoint that ``ghn-train fit`` wrote without them.

    Args:
        path: The checkpoint; it is replaced.
        num_graphs: How many training networks to look at.

    Raises:
        CheckpointError: The file cannot be read or written.
        TrainingError: Its card does not say how it was trained.
    """
    hypernetwork, summary = load_checkpoint(path)
    details = dict(summary.card.details)
    if "settings" not in details:
        raise TrainingError(f"the card of {path.name!r} does not say how it was trained")
    sampling = TrainingSettings.model_validate(details["settings"]).sampling
    task = Task(summary.config.num_classes, int(details["channels"]), int(details["image_size"]))
    details[METADATA_KEY] = training_graph_statistics(
        Pool("train", task, sampling.pool), sampling, num_graphs=num_graphs
    )
    card = dataclasses.replace(summary.card, details=details)
    return save_checkpoint(hypernetwork.half(), path, card=card)
