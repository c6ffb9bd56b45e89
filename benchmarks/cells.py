"""Results of a long experiment, one JSON line per finished cell, so that it can be stopped and resumed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Cell = dict[str, Any]


def run_cells(path: Path, cells: Iterable[Cell], measure: Callable[[Cell], Cell]) -> list[Cell]:
    """Measures every cell that is not in the file yet and appends it; returns all of them in order.

    Args:
        path: JSON lines; made with its folders if absent.
        cells: What to measure, each identified by all of its values.
        measure: Gives the results of a cell.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text().splitlines() if path.exists() else []
    known = {json.dumps(entry["cell"], sort_keys=True): entry for entry in map(json.loads, lines)}
    finished = []
    for cell in cells:
        key = json.dumps(cell, sort_keys=True)
        if key not in known:
            known[key] = {"cell": cell, "result": measure(cell)}
            with path.open("a") as file:
                file.write(json.dumps(known[key]) + "\n")
            print(key, json.dumps(known[key]["result"]), flush=True)
        finished.append({**cell, **known[key]["result"]})
    return finished
