"""``fit``: the common training loop for image classification, with progress, evaluation, early stopping and resume.

Plain loops stay plain - ``handle.parameters()`` goes into any optimizer; this is for those who do not want to write
one.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ghn_client.atomic_file import write_file
from ghn_client.batchnorm import evaluation_mode
from ghn_client.errors import FileError, InvalidOptionError
from ghn_client.finetune.delta import base_digest, replaced_names
from ghn_client.finetune.handle import FineTuneHandle

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}


@dataclass(frozen=True)
class EpochReport:
    """One epoch."""

    epoch: int  # from 1
    train_loss: float  # mean loss over the training batches, penalty included
    accuracy: float | None  # on the validation batches in eval mode; ``None`` without them
    loss: float | None  # mean loss there
    learning_rate: float  # at the end of the epoch
    seconds: float  # wall time, evaluation included


@dataclass(frozen=True)
class FitReport:
    """A finished run."""

    epochs: tuple[EpochReport, ...]  # one report per epoch, those before a resume included
    best_epoch: int  # whose values the module has now: the one with the best accuracy, or the last
    stopped_early: bool  # whether patience ran out

    @property
    def accuracy(self) -> float | None:
        """Validation accuracy of the values that the module has now."""
        return self.epochs[self.best_epoch - 1].accuracy


@dataclass(frozen=True)
class FitSettings:
    """How to train."""

    epochs: int = 10  # at most so many
    learning_rate: float = 0.05  # at the start; falls to zero along a cosine
    optimizer: str = "sgd"  # ``sgd`` (momentum 0.9) or ``adamw``
    weight_decay: float = 0.0  # on all tuned parameters; 0 is right for norm layers
    gradient_clip: float | None = 5.0  # largest norm of the gradient, ``None`` for no limit
    patience: int | None = None  # stop after so many epochs without a better accuracy; ``None`` never stops
    label_smoothing: float = 0.0  # of the cross-entropy

    def __post_init__(self) -> None:
        if self.epochs < 1 or not self.learning_rate > 0.0 or self.optimizer not in OPTIMIZERS:
            raise InvalidOptionError(
                f"expected epochs >= 1, learning_rate > 0 and optimizer of {', '.join(OPTIMIZERS)}; got {self}"
            )
        if self.patience is not None and self.patience < 1:
            raise InvalidOptionError(f"patience must be at least 1, got {self.patience}")


def fit(
    handle: FineTuneHandle,
    batches: Batches,
    *,
    settings: FitSettings | None = None,
    validation: Batches | None = None,
    device: torch.device | str | None = None,
    checkpoint: str | Path | None = None,
    on_epoch: Callable[[EpochReport], object] | None = None,
) -> FitReport:
    """Trains what ``handle`` tunes; the module ends in eval mode with its best values, also after an interruption.

    Args:
        handle: Of any strategy.
        batches: Pairs of inputs and labels; iterated once per epoch, so a ``DataLoader`` or a list. The state of its
            ``generator``, where it has one, goes into the checkpoint.
        settings: How to train.
        validation: Pairs to measure accuracy on after every epoch.
        device: Where to train; default where the module is.
        checkpoint: File written after every epoch; if it is there, training goes on from it.
        on_epoch: Called after every epoch, with its report; may print, plot or log.

    Raises:
        FileError: The checkpoint is damaged or belongs to another run: another strategy, other settings, another base.
            The module is unchanged then.
        InvalidOptionError: There is no batch, or the handle is disabled, or was merged or restored.
    """
    handle.require_enabled()
    settings = settings or FitSettings()
    place = torch.device(device) if device is not None else next(handle.module.parameters()).device
    handle.module.to(place)
    run = _Run(handle, settings, place)
    book = None if checkpoint is None else _Checkpoint(Path(checkpoint), run, batches)
    if book is not None and book.path.exists():
        book.resume()
    try:
        while len(run.reports) < settings.epochs and not run.out_of_patience:
            run.epoch(batches, validation)
            if book is not None:
                book.save()
            if on_epoch is not None:
                on_epoch(run.reports[-1])
    finally:  # also where it is interrupted
        run.write(run.best_state)
        handle.module.eval()
    return FitReport(tuple(run.reports), run.best_epoch, run.out_of_patience)


@torch.no_grad()
def evaluate(module: nn.Module, batches: Batches, *, device: torch.device | str | None = None) -> tuple[float, float]:
    """Accuracy and mean cross-entropy, on pairs of inputs and labels, of a module that returns logits (B, C).

    In eval mode; the mode is put back.

    Raises:
        InvalidOptionError: There is no batch.
    """
    place = torch.device(device) if device is not None else next(module.parameters()).device
    right, loss, count = 0, 0.0, 0
    with evaluation_mode(module):
        for inputs, labels in batches:
            logits, labels = module(inputs.to(place)), labels.to(place)
            right += int((logits.argmax(1) == labels).sum())
            loss += float(nn.functional.cross_entropy(logits.float(), labels, reduction="sum"))
            count += len(labels)
    if not count:
        raise InvalidOptionError("expected at least one batch to evaluate on, got none")
    return right / count, loss / count


class _Run:
    """State of a run between epochs."""

    def __init__(self, handle: FineTuneHandle, settings: FitSettings, device: torch.device) -> None:
        self.handle, self.settings, self.device = handle, settings, device
        options: dict[str, Any] = {"momentum": 0.9} if settings.optimizer == "sgd" else {}
        groups = handle.parameters(weight_decay=settings.weight_decay)
        self.optimizer = OPTIMIZERS[settings.optimizer](groups, lr=settings.learning_rate, **options)
        self.reports: list[EpochReport] = []
        self.best_epoch, self.best_state = 0, self.state()

    def state(self) -> dict[str, torch.Tensor]:
        """A copy of what is tuned."""
        return {name: value.clone() for name, value in self.handle.state().items()}

    @property
    def out_of_patience(self) -> bool:
        """Whether the last ``patience`` epochs brought nothing."""
        patience = self.settings.patience
        return patience is not None and len(self.reports) - self.best_epoch >= patience and self.best_epoch > 0

    def epoch(self, batches: Batches, validation: Batches | None) -> None:
        """Trains and evaluates one epoch."""
        start, number = time.perf_counter(), len(self.reports) + 1
        module, losses = self.handle.module, []
        module.train()
        rate = 0.5 * self.settings.learning_rate * (1 + math.cos(math.pi * (number - 1) / self.settings.epochs))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        for inputs, labels in batches:
            losses.append(self._step(inputs.to(self.device), labels.to(self.device)))
        if not losses:
            raise InvalidOptionError("expected at least one training batch, got none")
        accuracy = loss = None
        if validation is not None:
            accuracy, loss = evaluate(module, validation, device=self.device)
        train_loss = float(torch.stack(losses).mean())
        self.reports.append(EpochReport(number, train_loss, accuracy, loss, rate, time.perf_counter() - start))
        best = self.reports[self.best_epoch - 1].accuracy if self.best_epoch else None
        if accuracy is None or best is None or accuracy > best:
            self.best_epoch, self.best_state = number, self.state()

    def _step(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.handle.module(inputs)
        loss = nn.functional.cross_entropy(logits, labels, label_smoothing=self.settings.label_smoothing)
        loss = loss + self.handle.loss_penalty()
        loss.backward()  # type: ignore[no-untyped-call]
        if self.settings.gradient_clip is not None:
            tuned = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
            nn.utils.clip_grad_norm_(tuned, self.settings.gradient_clip)
        self.optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def write(self, state: Mapping[str, torch.Tensor]) -> None:
        """Puts tuned values into the module."""
        for name, value in self.handle.state().items():
            value.copy_(state[name])


class _Checkpoint:
    """The file from which a run goes on, and what it must agree with."""

    def __init__(self, path: Path, run: _Run, batches: Batches) -> None:
        self.path, self.run = path, run
        own = getattr(batches, "generator", None)
        self.generators = [torch.default_generator, *([own] if isinstance(own, torch.Generator) else [])]
        self.origin = {
            "strategy": run.handle.strategy,
            "settings": asdict(run.settings),
            "base": base_digest(run.handle.base, without=replaced_names(run.handle)),
        }

    def save(self) -> None:
        """Writes everything needed to go on; a crash while writing leaves the old file."""
        document = {
            **self.origin,
            "reports": [asdict(report) for report in self.run.reports],
            "best_epoch": self.run.best_epoch,
            "best_state": self.run.best_state,
            "state": self.run.state(),
            "optimizer": self.run.optimizer.state_dict(),
            "random": [generator.get_state() for generator in self.generators],
        }
        memory = io.BytesIO()  # torch would say of a full disk that it is broken itself
        torch.save(document, memory)
        write_file(self.path, memory.getbuffer())

    def resume(self) -> None:
        """Takes the state of a run of the same strategy, settings and base; changes nothing where it cannot."""
        run, name = self.run, self.path.name
        try:
            document = torch.load(self.path, map_location=run.device, weights_only=True)
        except OSError as error:
            raise FileError(f"cannot read {str(self.path)!r}: {error.strerror}", strerror=error.strerror) from error
        except Exception as error:  # torch raises many types on damaged bytes, with advice to run what is in them
            raise FileError(f"{name} is damaged, or no checkpoint of a fit; nothing in it was run") from error
        if not isinstance(document, dict):
            raise FileError(f"expected {name} to be the checkpoint of a fit, got a {type(document).__name__}")
        for key, expected in self.origin.items():
            if (found := document.get(key)) != expected:
                raise FileError(f"the checkpoint {name} belongs to another run: its {key} is {found}, not {expected}")
        try:
            states, best_epoch = (document["state"], document["best_state"]), document["best_epoch"]
            fits = all(_shapes(state) == _shapes(run.state()) for state in states)
            reports = [EpochReport(**report) for report in document["reports"]]
            random = [state.cpu() for state in document["random"]]
            if not fits:
                raise ValueError("its tensors are not those that this run tunes")
            run.optimizer.load_state_dict(document["optimizer"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FileError(f"{name} is damaged, or no checkpoint of a fit: {error}") from error
        run.write(states[0])
        run.reports, run.best_epoch, run.best_state = reports, best_epoch, states[1]
        for generator, state in zip(self.generators, random, strict=False):  # lists have none, whatever came before
            generator.set_state(state)


def _shapes(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items()}
