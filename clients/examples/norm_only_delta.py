"""Tunes norm layers and head of a predicted network, and keeps a delta of kilobytes: ``python norm_only_delta.py``.

The whole network is the request (architecture, hypernetwork, seed) plus the delta.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from common import EXAMPLE, accuracy, compare, connect, image_loaders, parser, small_network
from torch import nn

from ghn_client import recalibrate_batchnorm
from ghn_client.finetune import FitSettings, fit, load_delta, norm_only, save_delta


def main(arguments: Sequence[str] | None = None) -> None:
    """Tunes from both starts, and puts the first together again from its delta."""
    wanted = parser(__doc__)
    wanted.add_argument("--delta", type=Path, default=Path("delta.safetensors"), help="file to write")
    options = wanted.parse_args(arguments)
    training, test = image_loaders(options)
    settings = FitSettings(epochs=max(1, options.steps // max(1, len(training))), learning_rate=0.1)

    def tuned(network: nn.Module) -> float:
        handle = norm_only(network)
        score = fit(handle, training, settings=settings, validation=test).accuracy
        assert score is not None
        if network is predicted:
            size = save_delta(handle, options.delta)
            print(f"{handle.num_trainable:,} of {handle.num_total:,} parameters tuned, {size:,} bytes")
        return score

    predicted, again = small_network(), small_network(seed=1)
    with connect(options.address) as client:
        prediction = client.predict(predicted, EXAMPLE)
    for network in (predicted, again):
        prediction.load_into(network)
    recalibrate_batchnorm(predicted, training, num_batches=10)
    scores = tuned(predicted), tuned(small_network())
    rebuilt = accuracy(load_delta(again, options.delta).merge(), test)
    print(f"prediction and delta give {rebuilt:.1%} again")
    compare("accuracy of tuned norm layers and head", *scores)


if __name__ == "__main__":
    main(sys.argv[1:])
