"""The full state of a training run, written so that a crash leaves the old or the new one, never half.

It is one file, or a folder of parts where files must not be large.

Randomness needs no state: every draw of a run comes from a generator seeded with (seed, attempt, step, slot).
"""

from __future__ import annotations

import io
import logging
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ghn_client.atomic_file import replaced_file, write_file
from ghn_service.errors import TrainingError

logger = logging.getLogger(__name__)
STATE_FILE = "state.pt"
PREVIOUS_STATE_FILE = "state.previous.pt"
STATE_PARTS, PREVIOUS_STATE_PARTS, _UNFINISHED_PARTS = "state.parts", "state.previous.parts", "state.unfinished.parts"
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

    ``digest`` is that of ``settings``; ``average`` is the exponential moving average of the hypernetwork's state dict;
    ``earlier_pools`` are the networks per split that the weights had seen when the run began (older states: none),
    and ``data`` is the digest of the training images ("" in older states).
    """

    digest: str
    settings: dict[str, Any]
    progress: Progress
    hypernetwork: dict[str, torch.Tensor]
    average: dict[str, torch.Tensor]
    optimizers: list[dict[str, Any]]
    earlier_pools: dict[str, int] = field(default_factory=dict)
    data: str = ""


def save_state(state: TrainingState, folder: Path, *, part_bytes: int | None = None) -> Path:
    """Writes ``state`` into ``folder`` atomically; the state before it stays as ``state.previous.pt`` or ``.parts``.

    With ``part_bytes`` it is a folder of files of at most so many bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    body = {"format": _FORMAT, **vars(state), "progress": asdict(state.progress)}
    if part_bytes is not None:
        return _save_parts(body, folder, part_bytes)
    path = folder / STATE_FILE
    content = _encode(body)
    with replaced_file(path) as part:
        part.write_bytes(content)
        if path.exists():
            path.replace(folder / PREVIOUS_STATE_FILE)
    return path


def _save_parts(body: dict[str, Any], folder: Path, part_bytes: int) -> Path:
    """Writes a folder of parts beside the present one and takes its place."""
    path, previous, unfinished = (folder / name for name in (STATE_PARTS, PREVIOUS_STATE_PARTS, _UNFINISHED_PARTS))
    content = _encode(body)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    count = -(-len(content) // part_bytes)
    try:
        for index in range(count):
            part = content[index * part_bytes : (index + 1) * part_bytes]
            write_file(unfinished / f"{index:03d}-of-{count:03d}", part)
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)  # a full disk needs the room
        raise
    if path.exists():
        shutil.rmtree(previous, ignore_errors=True)
        path.rename(previous)
    unfinished.rename(path)
    return path


def _encode(body: dict[str, Any]) -> memoryview:
    """What ``torch.save`` writes; to a file it would say of a full disk that torch itself is broken."""
    memory = io.BytesIO()
    torch.save(body, memory)
    return memory.getbuffer()


def _read_parts(path: Path) -> io.BytesIO:
    """The content of a folder of parts."""
    parts = sorted(path.glob("*-of-*"))
    if not parts or len(parts) != int(parts[0].name.rpartition("-")[2]):
        raise TrainingError(f"{path.name} has {len(parts)} parts, not all of them")
    return io.BytesIO(b"".join(part.read_bytes() for part in parts))


def load_state(path: Path) -> TrainingState:
    """Reads a file or folder that ``save_state`` wrote; no code of it runs.

    Raises:
        TrainingError: It is damaged or of another kind.
    """
    try:
        body = torch.load(_read_parts(path) if path.is_dir() else path, map_location="cpu", weights_only=True)
        if (version := body.pop("format", None)) != _FORMAT:
            raise TrainingError(f"{path.name}: expected training state format {_FORMAT}, got {version!r}")
        return TrainingState(**{**body, "progress": Progress(**body["progress"])})
    except TrainingError:
        raise
    except Exception as error:  # torch.load raises many types on damaged bytes
        raise TrainingError(
            f"{path.name} is damaged, or no training state ({type(error).__name__}); nothing in it was run"
        ) from error


def find_state(folder: Path) -> TrainingState | None:
    """The newest readable state of a run folder; None where there is none.

    Raises:
        TrainingError: There are states, but none can be read.
    """
    names = (STATE_FILE, STATE_PARTS, PREVIOUS_STATE_FILE, PREVIOUS_STATE_PARTS)
    paths = [folder / name for name in names if (folder / name).exists()]
    for path in paths:
        try:
            return load_state(path)
        except TrainingError as error:
            logger.warning("%s", error)
            if path == paths[-1]:
                raise
    return None
