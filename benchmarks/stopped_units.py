"""How many units of a tiled decoder have stopped: ``python -m benchmarks.stopped_units CHECKPOINT``.

Over the first networks of split ``val``: units of the second layer that are positive for no tensor at any position of
the kernel grid, and those that are positive at its centre, which is all that linear layers and 1x1 convolutions read.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ghn_service.hypernetwork.checkpoint import load_checkpoint
from ghn_service.hypernetwork.features import build_features
from ghn_service.hypernetwork.tiled_decoder import TiledDecoder
from ghn_service.training.networks import Task, find_network
from ghn_service.training.revival import ACTIVE_SHARE, active_shares, matrix_embeddings, stopped_units


def main() -> None:
    """Prints one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--networks", type=int, default=60)
    options = parser.parse_args()
    hypernetwork, summary = load_checkpoint(options.checkpoint)
    decoder = hypernetwork.decoder
    if not isinstance(decoder, TiledDecoder):
        raise SystemExit(f"expected a checkpoint with the tiled decoder, got {summary.config.decoder!r}")
    task = Task(num_classes=summary.config.num_classes)
    graphs = (find_network("val", str(index), task).graph() for index in range(options.networks))
    embeddings = matrix_embeddings(hypernetwork, [build_features(graph, summary.config) for graph in graphs])
    _, _, height, width = decoder.max_shape
    at_centre = active_shares(decoder, embeddings)[height // 2, width // 2] > ACTIVE_SHARE
    stopped = stopped_units(decoder, embeddings)
    print(
        f"{int(stopped.sum())} of {len(stopped)} units have stopped; {int(at_centre.sum())} are active at the centre "
        f"({options.networks} networks, {summary.config.decoder_activation})"
    )


if __name__ == "__main__":
    main()
