"""What the training architectures look like, stored in the checkpoint so that reports can tell how far a graph is."""

from __future__ import annotations

from ghn_service.postprocess.distribution_shift import encode_statistics, summarize_graphs
from ghn_service.training.sampling import ArchitectureSource, NetworkStream
from ghn_service.training.settings import SamplingSettings

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
