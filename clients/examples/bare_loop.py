"""Predicted weights in a plain training loop: predict, load, recalibrate BatchNorm, train: ``python bare_loop.py``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from common import EXAMPLE, accuracy, compare, connect, image_loaders, parser, small_network, train

from ghn_client import recalibrate_batchnorm


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains from both starts."""
    options = parser(__doc__).parse_args(arguments)
    training, test = image_loaders(options)
    network = small_network()
    with connect(options.address) as client:
        print(client.predict(network, EXAMPLE).load_into(network))
    recalibrate_batchnorm(network, training, num_batches=10)  # statistics are no weights: measure them
    scores = [accuracy(train(start, training, options.steps), test) for start in (network, small_network())]
    compare(f"accuracy after {options.steps} steps", *scores)


if __name__ == "__main__":
    main(sys.argv[1:])
