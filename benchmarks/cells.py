"""Results of a long experiment, one JSON line per finished cell, so that it can be stopped and resumed."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

Cell = dict[str, Any]


def run_cells(path: Path, cells: Iterable[Cell], measure: Callable[[Cell], Cell], *, workers: int = 1) -> list[Cell]:
    """Measures every cell that is not in the file yet and appends it; returns all of them in order.

    Args:
        path: JSON lines; made with its folders if absent.
        cells: What to measure, each identified by all of its values.
        measure: Gives the results of a cell; with several workers it has to be a function of a module.
        workers: Processes, each with one thread. The results do not depend on their number.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text().splitlines() if path.exists() else []
    known = {_key(entry["cell"]): entry["result"] for entry in map(json.loads, lines)}
    wanted = list(cells)
    missing = list({_key(cell): cell for cell in wanted if _key(cell) not in known}.values())
    for cell, result in _measured(missing, measure, workers):
        known[_key(cell)] = result
        with path.open("a") as file:
            file.write(json.dumps({"cell": cell, "result": result}) + "\n")
        print(_key(cell), json.dumps(result), flush=True)
    return [{**cell, **known[_key(cell)]} for cell in wanted]


def _key(cell: Cell) -> str:
    return json.dumps(cell, sort_keys=True)


def _measured(cells: list[Cell], measure: Callable[[Cell], Cell], workers: int) -> Iterator[tuple[Cell, Cell]]:
    """Cells and results as they are finished."""
    if workers == 1:
        yield from ((cell, measure(cell)) for cell in cells)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread) as pool:
        running = {pool.submit(measure, cell): cell for cell in cells}
        try:
            for done in as_completed(running):
                yield running[done], done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
