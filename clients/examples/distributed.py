"""Data-parallel training where each process asks for its weights itself, and a server predicts them once.

Run ``torchrun --nproc-per-node 2 distributed.py``. Equal requests share one prediction. Without ``--address`` the
server is inside the first process; processes on several machines need one that all of them reach.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from common import EXAMPLE, accuracy, compare, connect, image_loaders, parser, small_network, train
from torch import distributed, nn

from ghn_client import GHNClient, recalibrate_batchnorm


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains from both starts; the first process prints."""
    options = parser(__doc__).parse_args(arguments)
    distributed.init_process_group("gloo")
    rank, size = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(rank)
    training, test = image_loaders(options, batch_size=64 // size)
    network = small_network()
    with ExitStack() as stack:
        first = stack.enter_context(connect(options.address)) if rank == 0 else None
        address = [first.address if first else ""]
        distributed.broadcast_object_list(address)
        client = first or stack.enter_context(GHNClient(address[0]))
        prediction = client.predict(network, EXAMPLE)
        digests: list[str | None] = [None] * size  # also: the server stays until all have their weights
        distributed.all_gather_object(digests, hashlib.sha256(prediction.buffer).hexdigest())
    assert len(set(digests)) == 1, "the processes got different weights: do they ask different servers?"
    prediction.load_into(network)
    recalibrate_batchnorm(network, training, num_batches=10)
    starts = [nn.parallel.DistributedDataParallel(start) for start in (network, small_network())]
    torch.manual_seed(rank)  # each process draws its own images
    scores = [accuracy(train(start, training, options.steps), test) for start in starts]
    if rank == 0:
        compare(f"accuracy after {options.steps} steps of {size} processes", *scores)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
