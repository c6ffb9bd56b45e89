"""The evaluation of a hypernetwork: zero-shot accuracy, the fine-tuning comparison, and the honesty check.

Measurements (``measurements.py``) run in parallel processes with one thread each, and finished ones are kept in a file,
so that an evaluation that was stopped goes on.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from ghn_service.training.evaluation.fine_tune import Comparison, Curve
from ghn_service.training.evaluation.measurements import (
    Context,
    EvaluationSettings,
    Measurement,
    make_context,
    measure,
    select_networks,
    training_digests,
)
from ghn_service.training.evaluation.results import ResultsFile, ZeroShot
from ghn_service.training.processes import on_stop_signals, work_through

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """Everything that was measured.

    Attributes:
        fine_tuned: One entry per network, data size and seed of which both sides are known.
        skipped: Networks left out: too expensive, or not made for this size of image.
        seconds: Wall-clock time of this call.
        in_training_pool: Per split, networks left out because the hypernetwork was trained on the same graph.
        pool_size: Networks in the training pool; 0 where the checkpoint does not say, so that none is left out.
        jobs: Measurements that the plan asks for.
        finished: Those that are known.
    """

    settings: EvaluationSettings
    zero_shot: tuple[ZeroShot, ...]
    fine_tuned: tuple[Comparison, ...]
    skipped: int
    seconds: float
    in_training_pool: Mapping[str, int] = field(default_factory=dict)
    pool_size: int = 0
    jobs: int = 0
    finished: int = 0


def evaluate(
    checkpoint: Path,
    data_folder: Path,
    settings: EvaluationSettings,
    *,
    workers: int = 1,
    cache: Path | None = None,
    results: Path | None = None,
    minutes: float | None = None,
) -> Evaluation:
    """Measures a checkpoint on images with splits train and test.

    SIGINT or SIGTERM ends it early with what is known by then; no measurement begins after ``minutes``. Those in the
    file ``results`` are not repeated; it grows with this call. The folder ``cache`` keeps decoded images and digests
    of training networks.

    Raises:
        CheckpointError: The checkpoint cannot be read.
        DataError: The images or the results cannot be read, or the images have another number of classes.
    """
    started = time.monotonic()
    start = partial(make_context, checkpoint, data_folder, settings, cache)
    context = start()
    known = ResultsFile(results)
    names, skipped, in_pool = select_networks(context, training_digests(context.trained_on, cache))
    zero_shot = [Measurement("zero-shot", split, name) for split, chosen in names.items() for name in chosen]
    comparisons = _both_sides(settings, names.get("test", ()))
    wanted = comparisons if settings.is_baseline_only else zero_shot + comparisons
    deadline = None if minutes is None else started + 60.0 * minutes
    try:
        with on_stop_signals(signal.default_int_handler):
            for is_first in (True, False):  # the other seeds use the learning rates that the first one chose
                wave = [item for item in wanted if (item.seed == settings.seeds[0]) == is_first]
                _measure(wave, context, known, start, workers, deadline)
    except KeyboardInterrupt:
        logger.warning("stopped; the same command with the same results file goes on from here")
    found = {item: result for item in wanted if (result := known.get(context.key(item))) is not None}
    pairs = [(item, curve, found.get(replace(item, kind="he"))) for item, curve in found.items()]
    return Evaluation(
        settings,
        tuple(result for result in found.values() if isinstance(result, ZeroShot)),
        tuple(
            Comparison(item.name, item.images, item.seed, curve, he)
            for item, curve, he in pairs
            if item.kind == "predicted" and isinstance(curve, Curve) and isinstance(he, Curve)
        ),
        skipped,
        time.monotonic() - started,
        in_pool,
        context.trained_on.size,
        jobs=len(wanted),
        finished=len(found),
    )


def _both_sides(settings: EvaluationSettings, names: tuple[str, ...]) -> list[Measurement]:
    """Both sides of every comparison, in an order in which a part of them is worth most: network by network."""
    return [
        Measurement(side, "test", name, images, seed)
        for seed in settings.seeds
        for images in settings.fine_tune_images
        for name in names[: settings.fine_tune_networks]
        for side in (("he",) if settings.is_baseline_only else ("predicted", "he"))
    ]


def _measure(
    wave: list[Measurement],
    context: Context,
    known: ResultsFile,
    start: Callable[[], Context],
    workers: int,
    deadline: float | None,
) -> None:
    """Measures what is not known yet, with the learning rates that the first seed chose; without one where it must."""
    started, first = time.monotonic(), context.settings.seeds[0]
    missing = [item for item in wave if known.get(context.key(item)) is None]
    if len(missing) < len(wave):
        logger.info("%d of %d measurements are known already", len(wave) - len(missing), len(wave))
    tasks: list[tuple[Measurement, float | None]] = []
    for item in missing:
        chosen = known.get(context.key(replace(item, seed=first)))
        rate = chosen.learning_rate if isinstance(chosen, Curve) else None
        if rate is not None or item.seed == first:
            tasks.append((item, rate))
    with closing(work_through(measure, tasks, start=start, workers=workers, deadline=deadline)) as finished:
        for number, ((item, _), result) in enumerate(finished, start=1):
            known.add(context.key(item), result, checkpoint=context.summary.digest[:12], job=vars(item))
            if isinstance(result, ZeroShot):
                scores = f"batch {result.batch:.3f} recalibrated {result.recalibrated:.3f}"
            else:
                points = " ".join(f"{value:.3f}" for value in result.test)
                scores = f"images {item.images or 'all'} seed {item.seed} rate {result.learning_rate}: {points}"
            where = f"{item.split}/{item.name} {item.kind}"
            seconds = time.monotonic() - started
            logger.info("%d of %d measurements after %.0f s: %s %s", number, len(tasks), seconds, where, scores)
