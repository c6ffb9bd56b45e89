"""Tunes the norm layers of a predicted network of ``transformers`` with its Trainer: ``python hf_trainer.py``.

Needs ``pip install transformers accelerate``. The Trainer takes the handle's parameter groups as its optimizer; a
delta holds what was tuned.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from common import compare, connect, image_loaders, parser
from torch.utils.data import DataLoader

from ghn_client import recalibrate_batchnorm
from ghn_client.finetune import FineTuneHandle, norm_only, save_delta


def small_resnet(classes: int = 3) -> transformers.PreTrainedModel:
    """A ResNet of a few thousand parameters, always the same."""
    torch.manual_seed(0)
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            num_channels=3,
            embedding_size=8,
            hidden_sizes=[8, 16],
            depths=[1, 1],
            layer_type="basic",
            num_labels=classes,
        )
    )


def tune(
    network: transformers.PreTrainedModel, samples: Sequence[dict], delta: str | Path, *, steps: int = 2
) -> FineTuneHandle:
    """Tunes norm layers and head of ``network`` on samples with ``pixel_values`` and ``labels``; writes the delta."""
    handle = norm_only(network, statistics="freeze")
    optimizer = torch.optim.AdamW(handle.parameters(), lr=0.01)
    with TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=4, report_to=[], use_cpu=True, save_strategy="no"
        )
        trainer = transformers.Trainer(network, arguments, train_dataset=samples, optimizers=(optimizer, None))
        trainer.train()
    save_delta(handle, delta)
    return handle


@torch.no_grad()
def accuracy(network: transformers.PreTrainedModel, test: DataLoader) -> float:
    """The share of images that are classified as they should be."""
    network.eval()
    right = [(network(images).logits.argmax(1) == labels).float() for images, labels in test]
    return float(torch.cat(right).mean())


def main(arguments: Sequence[str] | None = None) -> None:
    """Tunes from both starts."""
    options = parser(__doc__).parse_args(arguments)
    training, test = image_loaders(options)
    samples = [{"pixel_values": image, "labels": int(label)} for image, label in training.dataset]
    network = small_resnet(classes=10)
    with connect(options.address) as client:
        client.predict(network, (1, 3, 32, 32)).load_into(network)
    recalibrate_batchnorm(network, training, num_batches=10)
    scores = []
    for name, start in (("predicted", network), ("default", small_resnet(classes=10))):
        tune(start, samples, f"{name}.delta.safetensors", steps=options.steps)
        scores.append(accuracy(start, test))
    compare(f"accuracy after {options.steps} steps", *scores)


if __name__ == "__main__":
    main(sys.argv[1:])
