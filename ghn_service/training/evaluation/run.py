"""The evaluation of a hypernetwork: zero-shot accuracy, the fine-tuning comparison, and the honesty check.

Measurements (``measurements.py``) run in parallel processes with one thread each, and finished ones are kept in a file,
so that an evaluation that was stopped goes on.
"""

from __future__ import annotations

import logging
import math
import signal
import time
from collections import Counter
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
KINDS = {"zero-shot": "zero-shot", "predicted": "fine-tuning from predictions", "he": "fine-tuning from He"}


@dataclass(frozen=True)
class Evaluation:
    """Everything that was measured.

    Attributes:
        fine_tuned: One entry per network, data size and seed of which both sides are known.
        skipped: Networks left out: too expensive, or not made for this size of image.
        seconds: Wall-clock time of this call.
        in_training_pool: Per split, networks left out because the hypernetwork was trained on the same graph.
        pool_size: Networks in the training pools of the checkpoint and of those it began with; 0 where the checkpoint
            does not say, so that none is left out.
        pool_known: Those whose graphs were compared; fewer where time did not suffice for all.
        jobs: Measurements that the plan asks for; 0 where the time ended before the networks were chosen.
        finished: Those that are known.
        missing: Measurements that are not known, by kind and split.
        num_images: Images that the data has in ``training``, ``validation`` and ``test``; where the settings ask for
            more, all are taken.
    """

    settings: EvaluationSettings
    zero_shot: tuple[ZeroShot, ...]
    fine_tuned: tuple[Comparison, ...]
    skipped: int
    seconds: float
    in_training_pool: Mapping[str, int] = field(default_factory=dict)
    pool_size: int = 0
    pool_known: int = 0
    jobs: int = 0
    finished: int = 0
    missing: Mapping[str, int] = field(default_factory=dict)
    num_images: Mapping[str, int] = field(default_factory=dict)


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

    SIGINT, SIGTERM or the end of ``minutes`` cuts it short with what is known by then (outside the main thread a
    measurement that runs is finished); half of the minutes go at most into digests of training networks. Results in
    the file ``results`` are not measured again; it grows with this call. The folder ``cache`` keeps decoded images and
    the digests.

    Raises:
        CheckpointError: The checkpoint cannot be read.
        DataError: The images or the results cannot be read, or the images have another number of classes.
    """
    started = time.monotonic()
    budget_s = math.inf if minutes is None else 60.0 * minutes
    start = partial(make_context, checkpoint, data_folder, settings, cache)
    known = ResultsFile(results)
    context: Context | None = None
    wanted: list[Measurement] = []
    digests: list[str] = []
    skipped, in_pool = 0, dict[str, int]()
    try:
        with on_stop_signals(signal.default_int_handler, after_s=None if minutes is None else budget_s):
            context = start()
            for pool in context.trained_on:
                digests += training_digests(pool, cache, started + budget_s / 2)
            names, skipped, in_pool = select_networks(context, frozenset(digests))
            zero_shot = [Measurement("zero-shot", split, name) for split, chosen in names.items() for name in chosen]
            comparisons = _both_sides(settings, names.get("test", ()))
            wanted = comparisons if settings.is_baseline_only else zero_shot + comparisons
            for is_first in (True, False):  # the other seeds use the learning rates that the first one chose
                wave = [item for item in wanted if (item.seed == settings.seeds[0]) == is_first]
                _measure(wave, context, known, start, workers, started + budget_s)
    except KeyboardInterrupt:
        logger.warning("stopped; the same command with the same results file goes on from here")
    keys = {} if context is None else {item: context.key(item) for item in wanted}
    found = {item: result for item, key in keys.items() if (result := known.get(key)) is not None}
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
        sum(pool.size for pool in context.trained_on) if context else 0,
        len(digests),
        jobs=len(wanted),
        finished=len(found),
        missing=dict(Counter(f"{KINDS[item.kind]} of {item.split}" for item in wanted if item not in found)),
        num_images=context.num_images if context else {},
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
    deadline: float,
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
