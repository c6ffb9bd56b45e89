"""Tunes the norm layers of a network with Lightning and stores what was tuned: ``python lightning_training.py``.

Needs ``pip install lightning``. Take :class:`Tuned` into your own project; it works with every strategy.
"""

from __future__ import annotations

from pathlib import Path

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

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


if __name__ == "__main__":
    classifier = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    images = TensorDataset(torch.randn(64, 3, 8, 8), torch.randint(0, 4, (64,)))
    print(tune(classifier, DataLoader(images, batch_size=16), "norm.safetensors"))
