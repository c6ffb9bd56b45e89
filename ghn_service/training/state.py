"""The full state of a training run in one file, written so that a crash leaves the old or the new one, never half.

Randomness needs no state: every draw of a run comes from a generator seeded with (seed, attempt, step, slot).
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ghn_client.atomic_file import replaced_file
from ghn_service.errors import TrainingError

logger = logging.getLogger(__name__)
STATE_FILE = "state.pt"
PREVIOUS_STATE_FILE = "state.previous.pt"
_FORMAT = 1


@dataclass
class Progress:
    """Counters of a run.

    Attributes:
        step: Steps done.
        networks: Target networks trained on.
        next_index: Next candidate of the stream of architectures.
        attempt: How often the run was rolled back; part of every seed.
        skipped_networks: Networks left out because they were not finite.
        out_of_memory: Networks left out for lack of memory.
        bad_steps: Steps without an update.
        elapsed_s: Seconds of training, over all resumes.
    """

    step: int = 0
    networks: int = 0
    next_index: int = 0
    attempt: int = 0
    skipped_networks: int = 0
    out_of_memory: int = 0
    bad_steps: int = 0
    elapsed_s: float = 0.0


@dataclass(frozen=True, eq=False)
class TrainingState:
    """Everything that a run needs to go on.

    ``digest`` is that of ``settings``; ``average`` is the exponential moving average of the hypernetwork's state dict.
    """

    digest: str
    settings: dict[str, Any]
    progress: Progress
    hypernetwork: dict[str, torch.Tensor]
    average: dict[str, torch.Tensor]
    optimizers: list[dict[str, Any]]


def save_state(state: TrainingState, folder: Path) -> Path:
    """Writes ``state`` into ``folder`` atomically; the state before it stays as ``state.previous.pt``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / STATE_FILE
    with replaced_file(path) as part:
        torch.save({"format": _FORMAT, **vars(state), "progress": asdict(state.progress)}, part)
        if path.exists():
            path.replace(folder / PREVIOUS_STATE_FILE)
    return path


def load_state(path: Path) -> TrainingState:
    """Reads a file that ``save_state`` wrote; no code of the file runs.

    Raises:
        TrainingError: The file is damaged or of another kind.
    """
    try:
        body = torch.load(path, map_location="cpu", weights_only=True)
        if (version := body.pop("format", None)) != _FORMAT:
            raise TrainingError(f"{path.name}: expected training state format {_FORMAT}, got {version!r}")
        return TrainingState(**{**body, "progress": Progress(**body["progress"])})
    except TrainingError:
        raise
    except Exception as error:  # torch.load raises many types on damaged bytes
        raise TrainingError(f"{path.name} is no training state: {error}") from error


def find_state(folder: Path) -> TrainingState | None:
    """The newest readable state of a run folder: ``state.pt``, else ``state.previous.pt``; None without either.

    Raises:
        TrainingError: There are states, but none can be read.
    """
    paths = [folder / name for name in (STATE_FILE, PREVIOUS_STATE_FILE) if (folder / name).exists()]
    for path in paths:
        try:
            return load_state(path)
        except TrainingError as error:
            logger.warning("%s", error)
            if path == paths[-1]:
                raise
    return None
