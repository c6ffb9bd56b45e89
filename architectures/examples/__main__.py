"""Writes the example files: ``python -m architectures.examples``."""

from __future__ import annotations

import importlib
import logging

import torch

from architectures.examples import EXAMPLES, example_path
from architectures.registry import reference_architecture

_LOGGER = logging.getLogger(__name__)


def main() -> None:
    """Exports each example; the exporter is the client's, which this package otherwise does without."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    client = importlib.import_module("ghn_client")
    for name in EXAMPLES:
        architecture = reference_architecture(name)
        module = architecture.build(initialize=False).train()
        content: bytes = client.export_architecture(module, torch.zeros(2, *architecture.interface.input_shape))
        example_path(name).write_bytes(content)
        _LOGGER.info("%s: %d bytes", example_path(name).name, len(content))


if __name__ == "__main__":
    main()
