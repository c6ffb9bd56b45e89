"""Writes the structure-only ONNX files of this folder: ``python -m tests.data.regenerate``.

They are what torch's exporters write for the networks of the reference data, without weight data and stack traces,
compressed with xz. Needs torchvision (see tests/zoo_support.py) and a few minutes.
"""

from __future__ import annotations

import lzma
import sys
from pathlib import Path

import torch

from tests.golden_graphs import GOLDEN_CIFAR_MODELS, GOLDEN_MODELS

FOLDER = Path(__file__).parent
WITHOUT_BATCH_NORM = ("convnext_tiny", "vit_b_16", "swin_t", "squeezenet1_1")
FORMS: dict[str, tuple[str, ...]] = {
    "dynamo-train": (*GOLDEN_MODELS, *GOLDEN_CIFAR_MODELS),
    "dynamo-eval": ("googlenet", "vit_b_16", "resnet18"),
    "script-eval": (*GOLDEN_MODELS, *GOLDEN_CIFAR_MODELS),
    "dynamo-eval-optimize": (*WITHOUT_BATCH_NORM, "resnet18", "densenet121"),
    "script-eval-optimize": (*WITHOUT_BATCH_NORM, "resnet18"),
}


def stored_model(name: str, form: str) -> bytes:
    """The stored ONNX file of a network in a form of ``tests.zoo_support.export``."""
    return lzma.decompress((FOLDER / f"{name}.{form}.onnx.xz").read_bytes())


def main() -> None:
    """Exports every network in every form again."""
    from tests.zoo_support import build_torchvision, export

    for form, names in FORMS.items():
        for name in names:
            torch.manual_seed(0)
            module, example = build_torchvision(name)
            data = lzma.compress(export(module, example, form), preset=9)
            (FOLDER / f"{name}.{form}.onnx.xz").write_bytes(data)
            sys.stdout.write(f"{name} {form}: {len(data)} bytes\n")


if __name__ == "__main__":
    main()
