"""What the reproductions share: resumable cells, the choice of learning rates, and how results are told."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ghn_client.atomic_file import write_file
from ghn_client.finetune.images import measure_normalization
from ghn_service.training.evaluation.fine_tune import FineTuneData, mean_and_error
from ghn_service.training.evaluation.results import append_line, read_lines
from ghn_service.training.images import load_training_data, require_split
from ghn_service.training.processes import work_through
from ghn_service.training.settings import DataSettings

Cell = dict[str, Any]
CHOOSING_SEEDS = (1000, 1001, 1002)
"""The seeds with which learning rates are chosen on validation images; they are not among those reported."""
RATES = "half a decade apart, hill-climbed until one beats both its neighbours"
HELPS, HURTS, NO_DIFFERENCE = "helps", "hurts", "makes no difference that can be seen"
_COARSE = range(-5, 1)
_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)  # 97.5% of Student's t, by degrees of freedom


def run_cells(path: Path, cells: Iterable[Cell], measure: Callable[[Cell], Cell], *, workers: int = 1) -> list[Cell]:
    """Measures every cell that is not in the file yet and appends it; returns all of them in order.

    Args:
        path: JSON lines, one per finished cell, so that an experiment can be stopped and resumed; made if absent.
        cells: What to measure, each identified by all of its values.
        measure: Gives the results of a cell; with several workers it has to be a function of a module.
        workers: Processes, each with one thread. The results do not depend on their number.
    """
    known = {_key(entry["cell"]): entry["result"] for entry in map(json.loads, read_lines(path))}
    wanted = list(cells)
    missing = list({_key(cell): cell for cell in wanted if _key(cell) not in known}.values())
    for cell, result in work_through(
        _measured, missing, start=functools.partial(_on_one_thread, measure), workers=workers
    ):
        known[_key(cell)] = result
        append_line(path, {"cell": cell, "result": result})
        print(_key(cell), json.dumps(result), flush=True)
    return [{**cell, **known[_key(cell)]} for cell in wanted]


def _key(cell: Cell) -> str:
    return json.dumps(cell, sort_keys=True)


def _on_one_thread(measure: Callable[[Cell], Cell]) -> Callable[[Cell], Cell]:
    torch.set_num_threads(1)
    return measure


def _measured(measure: Callable[[Cell], Cell], cell: Cell) -> Cell:
    return measure(cell)


@functools.cache
def image_data(folder: Path, cache: Path | None, *, image_size: int, held_out: int) -> FineTuneData:
    """Training images in colour without the held-out ones, those (or the folder's own), and test images; read once."""
    settings = DataSettings(image_size=image_size, channels=3, validation_images=held_out)
    training, validation = load_training_data(folder, settings, cache)
    test = require_split(folder, "test", image_size=image_size, channels=3, cache=cache)
    return FineTuneData(training, validation, test, measure_normalization(training))


def run_seeds(
    path: Path,
    cell: Cell,
    measure: Callable[[Cell], Cell],
    *,
    seeds: int,
    rate: float | None = None,
    near: float | None = None,
) -> list[Cell]:
    """Chooses the learning rate of a cell on validation images unless it is given, then measures every seed with it.

    A climb with all of ``CHOOSING_SEEDS`` ends where a rate is better than the next lower and the next higher one: a
    choice is never at an edge. It begins at ``near``, such as what was chosen for fewer steps, else at the best of a
    coarse grid with the first seed.
    """

    def score(exponent: int, count: int = len(CHOOSING_SEEDS)) -> float:
        cells = [{**cell, "rate": _rate(exponent), "seed": seed} for seed in CHOOSING_SEEDS[:count]]
        return float(sum(item["accuracy"] for item in run_cells(path, cells, measure))) / count

    if rate is None:
        best = round(2 * math.log10(near)) if near else max(_COARSE, key=lambda exponent: score(exponent, 1))
        while (better := max((best, best - 1, best + 1), key=score)) != best:
            best = better
        rate = _rate(best)
    return run_cells(path, [{**cell, "rate": rate, "seed": seed} for seed in range(seeds)], measure)


def _rate(exponent: int) -> float:
    """One of the rates half a decade apart."""
    return float(f"{10 ** (exponent / 2):.0e}")


def grouped(cells: Iterable[Cell], *keys: str) -> dict[tuple[Any, ...], list[Cell]]:
    """Cells by their values of the keys, in order."""
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        groups.setdefault(tuple(cell[key] for key in keys), []).append(cell)
    return groups


def file_digest(path: Path) -> str:
    """The beginning of a file's SHA-256, which names a hypernetwork in cells and on pages."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def verdict(differences: Sequence[float]) -> str:
    """What paired differences say, by the same rule everywhere: a two-sided t test at 5%."""
    mean, error = mean_and_error(differences)
    if error > 0 and abs(mean) > _T[min(len(differences), len(_T) + 1) - 2] * error:
        return HELPS if mean > 0 else HURTS
    return NO_DIFFERENCE


def percent(values: Sequence[float], digits: int = 1, sign: str = "") -> str:
    """Mean and standard error of shares, in percent."""
    mean, error = mean_and_error(values)
    return f"{100 * mean:{sign}.{digits}f} ± {100 * error:.{digits}f}"


def fill_page(
    folder: Path, blocks: Mapping[str, Sequence[str]], charts: Mapping[str, str], *, page: str = "results.md"
) -> None:
    """Writes the lines of each block between ``<!-- NAME -->`` and ``<!-- end -->`` of a page, and the charts.

    Raises:
        ValueError: The page has no such block.
    """
    path = folder / page
    text = path.read_text()
    for name, lines in blocks.items():
        print(f"{name}:\n", *lines, "", sep="\n")
        before, mark, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if not end:
            raise ValueError(f"{path} has no block from {mark or name!r} to '<!-- end -->'")
        text = "".join((before, mark, *(f"{line}\n" for line in lines), end, after))
    write_file(path, text)
    for name, chart in charts.items():
        write_file(folder / f"{name}.svg", chart)
