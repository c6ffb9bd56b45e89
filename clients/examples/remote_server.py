"""Weights from a server elsewhere, over TLS and with a token: ``python remote_server.py --address HOST:PORT ...``.

On the server: ``ghn-server make-token alice --tokens tokens > alice.token``, then ``ghn-server serve --host 0.0.0.0
--tls-certificate server.pem --tls-key server.key --tokens tokens``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from common import EXAMPLE, accuracy, compare, image_loaders, parser, small_network, train

from ghn_client import GHNClient, recalibrate_batchnorm


def main(arguments: Sequence[str] | None = None) -> None:
    """Asks the server, and trains from both starts."""
    wanted = parser(__doc__)
    wanted.add_argument("--ca-file", type=Path, required=True, help="PEM file of the authority to trust")
    wanted.add_argument("--token-file", type=Path, required=True, help="file with the token")
    options = wanted.parse_args(arguments)
    training, test = image_loaders(options)
    network = small_network()
    token = options.token_file.read_text().strip()
    with GHNClient(options.address, token=token, root_certificates=options.ca_file) as client:
        print(f"{options.address} has {', '.join(model.name for model in client.models())}")
        print(client.predict(network, EXAMPLE).load_into(network))
    recalibrate_batchnorm(network, training, num_batches=10)
    scores = [accuracy(train(start, training, options.steps), test) for start in (network, small_network())]
    compare(f"accuracy after {options.steps} steps", *scores)


if __name__ == "__main__":
    main(sys.argv[1:])
