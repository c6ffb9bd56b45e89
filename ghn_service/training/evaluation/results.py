"""What an evaluation measures, and the file that keeps it: one JSON line per finished measurement.

A line's key names everything that the value depends on (checkpoint, data, network, protocol, seed), so that an
evaluation that was stopped goes on where it stopped, and results of one protocol are never taken for another's. The
He side of the fine-tuning comparison depends on no checkpoint: its lines serve every hypernetwork.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghn_client.atomic_file import write_file
from ghn_service.errors import DataError
from ghn_service.training.evaluation.fine_tune import Curve

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ZeroShot:
    """Scores of one network without training.

    Attributes:
        split: Where it comes from.
        name: Its number or name.
        batch: Accuracy with predicted weights, BatchNorm with statistics of the batch.
        recalibrated: Accuracy with predicted weights, BatchNorm recalibrated on training images.
        he_batch: Accuracy with He initialisation, BatchNorm with statistics of the batch.
        novelty: Median relative distance to the nearest training network's tensors; NaN where not measured.
        covered: Share of the values that have such a neighbour.
        copied: Accuracy (protocol ``batch``) with the nearest tensors in place of its own; NaN where not measured.
        layers: Weighted layers.
        width: Output channels of the first.
        likeness: Mean cosine between predicted layers of one role (``likeness``); NaN where none occurs twice.
    """

    split: str
    name: str
    batch: float
    recalibrated: float
    he_batch: float
    novelty: float = float("nan")
    covered: float = float("nan")
    copied: float = float("nan")
    layers: float = float("nan")
    width: float = float("nan")
    likeness: float = float("nan")


Result = ZeroShot | Curve
_KINDS: dict[str, type[Result]] = {"zero-shot": ZeroShot, "curve": Curve}


def result_key(**dependencies: Any) -> str:
    """A hash of everything that a result depends on, given as values for JSON."""
    return hashlib.sha256(json.dumps(dependencies, sort_keys=True).encode()).hexdigest()[:32]


class ResultsFile:
    """Finished measurements by key, in memory and, where a path is given, in a file that only grows.

    Raises:
        DataError: The file cannot be read, or a line inside it is broken.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._results: dict[str, Result] = {}
        if path is None:
            return
        for number, line in enumerate(read_lines(path), start=1):
            try:
                body = json.loads(line)
                self._results[body["key"]] = decode_result(body["result"])
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path.name} line {number} is no result of an evaluation: {error}") from error

    def get(self, key: str) -> Result | None:
        """The result with this key, or ``None``."""
        return self._results.get(key)

    def add(self, key: str, result: Result, **description: Any) -> None:
        """Keeps a result, described for people who read the file; it is there when this returns."""
        self._results[key] = result
        if self.path is None:
            return
        append_line(self.path, {"key": key, **description, "result": encode_result(result)})


def read_lines(path: Path) -> list[str]:
    """The lines of a file that only grows; a last one that was cut off is taken out. Makes the folder if absent.

    Raises:
        DataError: The file cannot be read.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if text and not text.endswith("\n"):
            text = text[: text.rfind("\n") + 1]
            write_file(path, text)
            logger.warning("%s ended in the middle of a line, which is measured again", path.name)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot use the results file {path.name}: {error}") from error
    return text.splitlines()


def append_line(path: Path, body: Mapping[str, Any]) -> None:
    """Writes a line of JSON at the end of a file; it is on the disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(body) + "\n")
        file.flush()
        os.fsync(file.fileno())


def encode_result(result: Result) -> dict[str, Any]:
    """A result as values for JSON; ``decode_result`` reads them back. What was not measured (NaN) is null."""
    kind = next(name for name, record in _KINDS.items() if isinstance(result, record))
    return {"kind": kind, **{name: None if value != value else value for name, value in vars(result).items()}}


def decode_result(body: Mapping[str, Any]) -> Result:
    """The result that ``encode_result`` wrote.

    Raises:
        ValueError: The kind is unknown.
        TypeError: A field is missing or unknown.
    """
    if (kind := body.get("kind")) not in _KINDS:
        raise ValueError(f"expected kind 'zero-shot' or 'curve', got {kind!r}")
    values: dict[str, Any] = {name: math.nan if value is None else value for name, value in body.items()}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    del values["kind"]
    return _KINDS[kind](**values)
