"""A network that starts, and trains, with low-rank factors in the place of its weights.

Run ``python low_rank_start.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from common import EXAMPLE, accuracy, compare, connect, image_loaders, parser, small_network, train

from ghn_client import recalibrate_batchnorm
from ghn_client.finetune import factorize_module


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains factors from predicted weights, and the whole network from its default initialisation."""
    wanted = parser(__doc__)
    wanted.add_argument("--fraction", type=float, default=0.25, help="rank, as a share of the full one")
    options = wanted.parse_args(arguments)
    training, test = image_loaders(options)
    whole = small_network()
    with connect(options.address) as client:
        prediction = client.predict(whole, EXAMPLE, low_rank={"fraction": options.fraction})
    factored = factorize_module(whole, prediction)
    recalibrate_batchnorm(factored, training, num_batches=10)
    sizes = [sum(value.numel() for value in network.parameters()) for network in (factored, whole)]
    scores = [accuracy(train(network, training, options.steps), test) for network in (factored, whole)]
    compare(f"accuracy after {options.steps} steps, {sizes[0]:,} of {sizes[1]:,} parameters against all", *scores)


if __name__ == "__main__":
    main(sys.argv[1:])
