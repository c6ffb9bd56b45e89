"""What a run reports: JSON lines for programs, TensorBoard for curves, the logger for people."""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

from ghn_service.errors import DataError, TrainingError

logger = logging.getLogger(__name__)
LOG_FILE = "log.jsonl"


class RunLog:
    """Writes the records of a run into its folder; without one, as in other processes than the main one, nothing."""

    def __init__(self, folder: Path | None) -> None:
        self._file = None
        self._board: Any = None
        if folder is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter  # imported here: it takes a second
        except ImportError as error:
            raise TrainingError("training needs the package tensorboard: pip install tensorboard") from error
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / LOG_FILE).open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"))

    def write(self, kind: str, step: int, **values: float | str) -> None:
        """Writes one record of kind ``train``, ``validation`` or ``event``; its numbers are also drawn as curves."""
        if self._file is None:
            return
        record: dict[str, Any] = {"kind": kind, "step": step, "time": round(time.time(), 3)}
        shown = []
        for name, value in values.items():
            record[name] = value
            if isinstance(value, float):
                record[name] = round(value, 6) if math.isfinite(value) else None
            if not isinstance(value, str):
                self._board.add_scalar(f"{kind}/{name}", value, step)
            shown.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        logger.info("%s step %d: %s", kind, step, " ".join(shown))

    def close(self) -> None:
        """Flushes and closes both outputs."""
        if self._file is not None:
            self._file.close()
            self._board.close()
            self._file = None


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The records of a run, in order; a last line that was cut off is left out.

    Raises:
        DataError: The folder has no log.
    """
    path = folder / LOG_FILE
    if not path.is_file():
        raise DataError(f"no {LOG_FILE} in {folder}; expected the folder of a training run")
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
