"""``initialize``: the best start that the service can give a module, in one line."""

from __future__ import annotations

import html
import itertools
import os
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ghn_client.batchnorm import recalibrate_batchnorm
from ghn_client.client import GHNClient
from ghn_client.errors import InvalidOptionError
from ghn_client.info import Transfer, Trust
from ghn_client.loading import LoadReport
from ghn_client.prediction import Prediction
from ghn_client.sources import AUTO, SourceLike

CALIBRATION_BATCHES, CLASSES_SHOWN = 20, 3


@dataclass(frozen=True, eq=False)
class InitializeReport:
    """What became of a module; prints as a few lines, and as a page in a notebook.

    Attributes:
        prediction: The weights and where each came from.
        loaded: What was loaded.
        batchnorm: What became of the running statistics of BatchNorm; half a sentence.
        address: The server; "" for one inside the process.
    """

    prediction: Prediction
    loaded: LoadReport
    batchnorm: str
    address: str

    @property
    def trust(self) -> Trust:
        """How much to expect of the weights."""
        return self.prediction.trust

    def __str__(self) -> str:
        shares = self.trust.describe_shares()
        metadata, transfer = self.prediction.metadata, self.prediction.transfer
        lines = [
            f"{self.prediction.num_parameters:,} parameters in {len(self.loaded.loaded)} tensors: {shares}",
            f"source: {_describe(transfer) if transfer else 'none'}",
            f"hypernetwork {metadata.model}, seed {metadata.seed}, {self.address or 'inside this process'}",
            f"BatchNorm: {self.batchnorm}",
            *(f"note: {sentence}" for sentence in self.prediction.warnings),
            f"trust: {self.trust}",
        ]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>{self.prediction._repr_html_()}"


def initialize(
    module: nn.Module,
    example_inputs: Any = None,
    *,
    loader: Iterable[Any] | None = None,
    address: str | None = None,
    checkpoint: str | Path | None = None,
    source: SourceLike | None = AUTO,
    seed: int = 0,
    client: GHNClient | None = None,
    **options: Any,
) -> InitializeReport:
    """Gives a module the best start that the service can give: predicts its weights, loads them, measures BatchNorm.

    Example::

        print(initialize(module, loader=loader))

    Args:
        module: The network; changed in place.
        example_inputs: What it is called with (``export_architecture``); None to take it from the loader, or from what
            the module declares.
        loader: Training batches: tensors, ``(inputs, ...)`` or dicts of keyword arguments. The running statistics of
            BatchNorm are measured on the first 20; without a loader they stay as they are.
        address: A server; None for ``GHN_ADDRESS``, and where that is not set, one inside this process.
        checkpoint: The hypernetwork of a server inside this process; None for the bundled one.
        source: A trained network to take weights from wherever it fits; as in ``GHNClient.predict``. ``auto`` takes one
            of the server's library if that pays, as the report says; None leaves all to the hypernetwork. Where the
            class layer is kept although the classes are others, say ``head="reset"``.
        seed: Seed of everything that is drawn.
        client: A client to ask, for TLS and tokens; instead of address and checkpoint.
        options: Further ones of ``GHNClient.predict``: ``steps``, ``model``, ``head``, ``report``, ...

    Raises:
        InvalidOptionError: Two servers are named, or the loader gives no batch.
        GhnClientError: Another of its kinds; see ``ghn_client.errors``. The module is unchanged then.
    """
    if sum(item is not None for item in (address, checkpoint, client)) > 1:
        raise InvalidOptionError("address, checkpoint and client each name a server; give one", field="address")
    if loader is not None:
        first, loader = _first_batch(loader)
        if example_inputs is None:
            example_inputs = first if isinstance(first, dict | torch.Tensor) else first[0]
    with ExitStack() as stack:
        asked = client or stack.enter_context(_connect(address, checkpoint))
        where = "" if client is None and asked.is_embedded else asked.address
        prediction = asked.predict(module, example_inputs, seed=seed, source=source, **options)
    loaded = prediction.load_into(module)
    return InitializeReport(prediction, loaded, measure_batchnorm(module, loader, prediction), where)


def _connect(address: str | None, checkpoint: str | Path | None) -> GHNClient:
    address = address or ("" if checkpoint is not None else os.environ.get("GHN_ADDRESS", ""))
    return GHNClient(address) if address else GHNClient.embedded(checkpoint)


def _first_batch(loader: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """The first batch, and a loader that still gives it, once."""
    batches = iter(loader)
    first = next(batches, None)
    if first is None:
        raise InvalidOptionError("expected at least one batch, got an empty loader", field="loader")
    return first, itertools.chain([first], batches)


def _describe(transfer: Transfer) -> str:
    """What a source gave, and what of its data belongs to its function."""
    told = [str(transfer)]
    if transfer.source.dataset:
        told.append(f"trained on {transfer.source.dataset}")
    if scales := transfer.source.card.get("normalization"):
        numbers = (f"{key} {', '.join(f'{value:.3g}' for value in values)}" for key, values in scales.items())
        told.append(f"images normalised by {' and '.join(numbers)}")
    if transfer.is_exact and (names := transfer.source.class_names):
        told.append(f"classes {', '.join(names[:CLASSES_SHOWN])}{', ...' if len(names) > CLASSES_SHOWN else ''}")
    return "; ".join(told)


def measure_batchnorm(module: nn.Module, loader: Iterable[Any] | None, prediction: Prediction) -> str:
    """Measures the running statistics on 20 batches where that is right; says what became of them."""
    if not any(isinstance(layer, _BatchNorm) and layer.track_running_stats for layer in module.modules()):
        return "there is none with running statistics"
    if prediction.transfer is not None and not prediction.needs_recalibration:
        return "the source's running statistics, which belong to its weights"
    if loader is None and prediction.statistics:
        return "the source's running statistics; pass loader= to measure those of what was changed"
    if loader is None:
        return "running statistics are not measured: pass loader=, or train before you evaluate"
    used = recalibrate_batchnorm(module, loader, num_batches=CALIBRATION_BATCHES)
    return f"running statistics measured on {used} batches"
