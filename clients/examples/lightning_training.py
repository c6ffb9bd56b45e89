"""Tunes the norm layers of a predicted network with Lightning and stores the delta: ``python lightning_training.py``.

Needs ``pip install lightning``. Take :class:`Tuned` into your own project; it works with every strategy.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import lightning
import torch
from common import EXAMPLE, accuracy, compare, connect, image_loaders, parser, small_network
from torch import nn
from torch.utils.data import DataLoader

from ghn_client import recalibrate_batchnorm
from ghn_client.finetune import FineTuneHandle, norm_only, save_delta


class Tuned(lightning.LightningModule):
    """Optimises what a handle tunes, and nothing else, with cross-entropy on (inputs, labels) batches."""

    def __init__(self, handle: FineTuneHandle, *, learning_rate: float = 0.05) -> None:
        super().__init__()
        self.handle, self.network, self.learning_rate = handle, handle.module, learning_rate

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], _index: int) -> torch.Tensor:
        """Cross-entropy, and the penalty of the strategy where it has one."""
        inputs, labels = batch
        return nn.functional.cross_entropy(self.network(inputs), labels) + self.handle.loss_penalty()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD on the handle's parameter groups."""
        return torch.optim.SGD(self.handle.parameters(), lr=self.learning_rate, momentum=0.9)


def tune(network: nn.Module, loader: DataLoader, delta: str | Path, *, epochs: int = 1) -> FineTuneHandle:
    """Tunes norm layers and head of ``network`` and writes the delta."""
    handle = norm_only(network)
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(Tuned(handle, learning_rate=0.1), loader)
    save_delta(handle, delta)
    return handle


def main(arguments: Sequence[str] | None = None) -> None:
    """Tunes from both starts."""
    options = parser(__doc__).parse_args(arguments)
    training, test = image_loaders(options)
    network = small_network()
    with connect(options.address) as client:
        client.predict(network, EXAMPLE).load_into(network)
    recalibrate_batchnorm(network, training, num_batches=10)
    epochs = max(1, options.steps // max(1, len(training)))
    scores = []
    for name, start in (("predicted", network), ("default", small_network())):
        tune(start, training, f"{name}.delta.safetensors", epochs=epochs)
        scores.append(accuracy(start, test))
    compare("accuracy of tuned norm layers and head", *scores)


if __name__ == "__main__":
    main(sys.argv[1:])
