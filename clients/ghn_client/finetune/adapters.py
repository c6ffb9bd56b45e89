"""Callbacks that put a handle into Lightning and into the Trainer of ``transformers``; both libraries are extras."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ghn_client.errors import MissingExtraError
from ghn_client.finetune.delta import save_delta
from ghn_client.finetune.handle import FineTuneHandle


def lightning_module(
    handle: FineTuneHandle, *, learning_rate: float = 0.05, momentum: float = 0.9, delta: str | Path | None = None
) -> Any:
    """A ``LightningModule`` for classification that optimises what ``handle`` tunes, and nothing else.

    Args:
        handle: Of any strategy.
        learning_rate: Of SGD.
        momentum: Of SGD.
        delta: File to which the tuned part is written at the end of training.

    Raises:
        MissingExtraError: Lightning is not installed.
    """
    base = _lightning()

    class Tuned(base):  # type: ignore[misc, valid-type]
        """Cross-entropy on ``(inputs, labels)`` batches."""

        def __init__(self) -> None:
            super().__init__()
            self.network = handle.module

        def forward(self, inputs: torch.Tensor) -> Any:
            return self.network(inputs)

        def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], _index: int) -> torch.Tensor:
            loss = torch.nn.functional.cross_entropy(self(batch[0]), batch[1]) + handle.loss_penalty()
            self.log("train_loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(handle.parameters(), lr=learning_rate, momentum=momentum)

        def on_train_end(self) -> None:
            if delta is not None:
                save_delta(handle, delta)

    return Tuned()


def trainer_optimizers(
    handle: FineTuneHandle, *, learning_rate: float = 1e-3, weight_decay: float = 0.0
) -> tuple[torch.optim.Optimizer, None]:
    """The ``optimizers`` argument of the Trainer of ``transformers``: the handle's groups, the Trainer's own schedule.

    Args:
        handle: Of any strategy, on a model of ``transformers``.
        learning_rate: Of AdamW.
        weight_decay: On all tuned parameters.
    """
    groups = handle.parameters(weight_decay=weight_decay)
    return torch.optim.AdamW(groups, lr=learning_rate), None


def _lightning() -> Any:
    for name in ("lightning", "pytorch_lightning"):
        try:
            return __import__(name).LightningModule
        except ImportError:
            continue
    raise MissingExtraError("this adapter needs Lightning: pip install lightning")
