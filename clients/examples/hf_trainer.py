"""Tunes the norm layers of a network of ``transformers`` with its Trainer: ``python hf_trainer.py``.

Needs ``pip install transformers accelerate``. The Trainer takes the handle's parameter groups as its optimizer; a
delta holds what was tuned.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers

from ghn_client.finetune import FineTuneHandle, norm_only, save_delta


def small_resnet() -> transformers.PreTrainedModel:
    """A ResNet of a few thousand parameters, always the same."""
    torch.manual_seed(0)
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
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


if __name__ == "__main__":
    images = [{"pixel_values": torch.randn(3, 16, 16), "labels": index % 3} for index in range(8)]
    print(tune(small_resnet(), images, "norm.safetensors"))
