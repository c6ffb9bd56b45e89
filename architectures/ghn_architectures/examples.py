"""Structure-only ONNX files of a few reference networks, for the README, the tests and first steps.

``python -m ghn_architectures.examples`` writes them anew, byte for byte.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from ghn_architectures.registry import reference_architecture
from ghn_client import export_architecture

FOLDER = Path(__file__).resolve().parents[1] / "examples"
EXAMPLES: tuple[str, ...] = ("resnet20", "se_mobilenet_mini", "convnext_atto", "vit_mini")

_LOGGER = logging.getLogger(__name__)


def main() -> None:
    """Exports each example from the checkout's own definition of the network."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in EXAMPLES:
        architecture = reference_architecture(name)
        module = architecture.build(initialize=False).train()
        content = export_architecture(module, torch.zeros(2, *architecture.interface.input_shape))
        (FOLDER / f"{name}.onnx").write_bytes(content)
        _LOGGER.info("%s.onnx: %d bytes", name, len(content))


if __name__ == "__main__":
    main()
