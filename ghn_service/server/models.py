"""The hypernetworks of a server: loaded in the background, one copy per device, found by name."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from ghn_service.errors import CheckpointError, GhnServiceError, UnavailableError, UnknownModelError, memory_errors
from ghn_service.graph.architecture import ArchitectureGraph
from ghn_service.hypernetwork.checkpoint import CheckpointSummary
from ghn_service.hypernetwork.download import find_checkpoint
from ghn_service.predictor import (
    ArchitectureAnalysis,
    OnStage,
    PlannedTransfer,
    PredictionOptions,
    PredictionResult,
    Predictor,
    choose_device,
)
from ghn_service.server.settings import CheckpointFile

logger = logging.getLogger(__name__)


class ServedPredictor(Protocol):
    """What a server needs of a ``Predictor``."""

    summary: CheckpointSummary | None

    def run(
        self,
        architecture: ArchitectureGraph,
        *,
        options: PredictionOptions,
        on_stage: OnStage,
        transfer: PlannedTransfer | None = None,
    ) -> PredictionResult:
        """Predicts weights; called by one thread at a time."""
        ...

    def analyze(
        self, architecture: ArchitectureGraph, *, transfer: PlannedTransfer | None = None, head: str = "auto"
    ) -> ArchitectureAnalysis:
        """Says what ``run`` would do."""
        ...


LoadPredictor = Callable[[Path, str], ServedPredictor]
"""Makes a predictor of a checkpoint file and the name of a device."""


def load_predictor(path: Path, device: str, *, compute_dtype: str = "float32") -> ServedPredictor:
    """The real ``LoadPredictor``."""
    return Predictor.from_checkpoint(path, device=device, compute_dtype=compute_dtype)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """One hypernetwork.

    Attributes:
        name: Name in requests.
        summary: What its checkpoint holds.
        predictors: One copy per device.
        devices: Name of the device of each copy.
    """

    name: str
    summary: CheckpointSummary
    predictors: tuple[ServedPredictor, ...]
    devices: tuple[str, ...]


class ModelRegistry:
    """Loads checkpoints in a thread of its own, so that a server answers while large ones are read.

    Args:
        files: Checkpoint by name, the default one first.
        devices: Names of the devices.
        load: Reads one checkpoint onto one device.
        on_done: Called once, when none is left to load.
    """

    def __init__(
        self,
        files: Mapping[str, CheckpointFile],
        devices: tuple[str, ...],
        *,
        load: LoadPredictor = load_predictor,
        on_done: Callable[[], None] = lambda: None,
    ) -> None:
        self.devices = devices
        self._files = dict(files)
        self._load = load
        self._on_done = on_done
        self._models: dict[str, LoadedModel] = {}
        self._failures: dict[str, GhnServiceError] = {}
        self._is_done = False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._load_all, name="ghn-loader", daemon=True)

    def start(self) -> None:
        """Begins to load."""
        self._thread.start()

    def wait(self, timeout_s: float | None = None) -> None:
        """Waits until everything is loaded.

        Raises:
            UnavailableError: It takes longer than this.
            CheckpointError: A checkpoint cannot be loaded.
        """
        if not self._done.wait(timeout_s):
            raise UnavailableError(f"the hypernetworks were not loaded within {timeout_s} seconds")
        for failure in self._failures.values():
            raise failure

    @property
    def is_ready(self) -> bool:
        """Whether a hypernetwork is loaded and none is left to load."""
        return self._is_done and bool(self._models)

    @property
    def default_name(self) -> str:
        """Name of the hypernetwork that requests without a name use."""
        return next(iter(self._files))

    def loaded(self) -> tuple[LoadedModel, ...]:
        """The hypernetworks that are ready, the default one first."""
        return tuple(self._models[name] for name in self._files if name in self._models)

    def get(self, name: str) -> LoadedModel:
        """The hypernetwork of this name; the default one for "".

        Raises:
            UnknownModelError: There is none of this name.
            UnavailableError: It is still being loaded.
            CheckpointError: It cannot be loaded.
        """
        name = name or self.default_name
        if name in self._models:
            return self._models[name]
        if name in self._failures:
            raise CheckpointError(
                f"the hypernetwork {name!r} could not be loaded when this server started", field="model"
            )
        if name in self._files:
            raise UnavailableError(f"the hypernetwork {name!r} is still being loaded; try again", field="model")
        raise UnknownModelError(f"no hypernetwork {name!r}; known are {', '.join(self._files)}", field="model")

    def _load_all(self) -> None:
        for name, file in self._files.items():
            try:
                self._models[name] = self._load_one(name, file)
                logger.info("loaded", extra={"model": name, "digest": self._models[name].summary.digest})
            except GhnServiceError as error:
                self._failures[name] = error
            except Exception:
                logger.exception("a checkpoint cannot be loaded", extra={"model": name})
                self._failures[name] = CheckpointError(
                    f"the checkpoint {Path(file.source).name!r} cannot be loaded; see the log"
                )
            if name in self._failures:
                logger.error("cannot load %s: %s", name, self._failures[name], extra={"model": name})
        self._is_done = True
        self._on_done()
        self._done.set()

    def _load_one(self, name: str, file: CheckpointFile) -> LoadedModel:
        with memory_errors(f"there is not enough memory to load {Path(file.source).name!r}"):
            path = find_checkpoint(file.source)
            predictors = tuple(self._load(path, device) for device in self.devices)
        summaries = [predictor.summary for predictor in predictors]
        for summary in summaries:
            assert summary is not None, "a predictor that was loaded from a file knows what was in it"
            if file.digest and summary.digest != file.digest:
                raise CheckpointError(
                    f"expected {Path(file.source).name!r} with the sha256 {file.digest}, got one with {summary.digest}"
                )
        assert summaries[0] is not None
        return LoadedModel(name, summaries[0], predictors, self.devices)


def resolve_devices(names: tuple[str, ...]) -> tuple[str, ...]:
    """Full names of the devices (``cuda:0`` for ``auto`` on a machine with a GPU), one for each worker.

    Raises:
        InvalidOptionError: There is no such device.
    """
    devices = [choose_device(name) for name in names or ("auto",)]
    full = [torch.device(item.type, item.index or 0) if item.type == "cuda" else item for item in devices]
    return tuple(str(device) for device in full)
