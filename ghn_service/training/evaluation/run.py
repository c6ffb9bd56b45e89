"""The evaluation of a hypernetwork: zero-shot accuracy, the fine-tuning comparison, and the honesty check.

Every measurement is one job (``jobs.py``); jobs run in parallel processes with one thread each, and finished
ones are kept in a file, so that an evaluation that was stopped goes on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

from ghn_service.training.evaluation.fine_tune import Comparison, Curve
from ghn_service.training.evaluation.jobs import (
    Context,
    Setup,
    make_context,
    measure,
    select_networks,
    start_process,
    training_digests,
)
from ghn_service.training.evaluation.processes import interrupted_by_sigterm, work_through
from ghn_service.training.evaluation.results import FineTuned, Result, ResultsFile, ZeroShot
from ghn_service.training.evaluation.settings import EvaluationSettings, Job, fine_tune_jobs

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """Everything that was measured.

    Attributes:
        settings: What was asked for.
        zero_shot: One entry per network.
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
    fine_tuned: tuple[FineTuned, ...]
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
    """Measures a checkpoint; SIGINT or SIGTERM ends it early with what is known by then.

    Args:
        checkpoint: File of ``ghn-train fit``.
        data_folder: Images with splits train and test.
        settings: What to measure.
        workers: Processes; each uses one thread.
        cache: Folder for decoded images and digests of training networks.
        results: File of finished measurements, which are not repeated; it grows with this call.
        minutes: No measurement begins after this time.

    Raises:
        CheckpointError: The checkpoint cannot be read.
        DataError: The images or the results cannot be read, or the images have another number of classes.
    """
    started = time.monotonic()
    setup = Setup(checkpoint, data_folder, settings, cache)
    context = make_context(setup)
    known = ResultsFile(results)
    selection = select_networks(context, training_digests(context.trained_on, cache))
    names = selection.names.get("test", ())
    jobs = [Job("zero-shot", split, name) for split, chosen in selection.names.items() for name in chosen]
    waves = [
        ([] if settings.is_baseline_only else jobs) + fine_tune_jobs(settings, names, settings.seeds[:1]),
        fine_tune_jobs(settings, names, settings.seeds[1:]),  # these use the learning rates that the first seed chose
    ]
    deadline = None if minutes is None else started + 60.0 * minutes
    try:
        with interrupted_by_sigterm():
            for wave in waves:
                _measure(wave, context, known, setup, workers, deadline)
    except KeyboardInterrupt:
        logger.warning("stopped; the same command with the same results file goes on from here")
    collected = _collect([job for wave in waves for job in wave], context, known)
    return replace(
        collected,
        skipped=selection.skipped,
        in_training_pool=selection.in_pool,
        pool_size=context.trained_on.size,
        seconds=time.monotonic() - started,
    )


def _measure(
    jobs: list[Job], context: Context, known: ResultsFile, setup: Setup, workers: int, deadline: float | None
) -> None:
    """Measures what is not known yet."""
    started = time.monotonic()
    keys = {job: context.key(job) for job in jobs}
    missing = [(job, _known_rate(job, context, known)) for job in jobs if known.get(keys[job]) is None]
    ready = [(job, rate) for job, rate in missing if rate is not None or job.seed == context.settings.seeds[0]]
    if len(missing) < len(jobs):
        logger.info("%d of %d measurements are known already", len(jobs) - len(missing), len(jobs))
    finished = work_through(measure, ready, start=start_process, setup=setup, workers=workers, deadline=deadline)
    with closing(finished):
        for number, ((job, _), result) in enumerate(finished, start=1):
            known.add(keys[job], result, checkpoint=context.summary.digest[:12], job=vars(job))
            seconds = time.monotonic() - started
            logger.info("%d of %d measurements after %.0f s: %s", number, len(ready), seconds, _line(job, result))


def _known_rate(job: Job, context: Context, known: ResultsFile) -> float | None:
    """The learning rate that the first seed chose for the same side, network and images."""
    first = context.settings.seeds[0]
    if job.kind == "zero-shot" or job.seed == first:
        return None
    result = known.get(context.key(replace(job, seed=first)))
    return result.learning_rate if isinstance(result, Curve) else None


def _collect(jobs: list[Job], context: Context, known: ResultsFile) -> Evaluation:
    """The finished results in the order of the jobs."""
    results = {job: result for job in jobs if (result := known.get(context.key(job))) is not None}
    fine_tuned = []
    for job, curve in results.items():
        he = results.get(replace(job, kind="he"))
        if job.kind == "predicted" and isinstance(curve, Curve) and isinstance(he, Curve):
            fine_tuned.append(FineTuned(job.name, job.images, job.seed, Comparison(curve, he)))
    zero_shot = tuple(result for result in results.values() if isinstance(result, ZeroShot))
    return Evaluation(context.settings, zero_shot, tuple(fine_tuned), 0, 0.0, jobs=len(jobs), finished=len(results))


def _line(job: Job, result: Result) -> str:
    where = f"{job.split}/{job.name}"
    if isinstance(result, ZeroShot):
        return f"{where} batch {result.batch:.3f} recalibrated {result.recalibrated:.3f}"
    points = " ".join(f"{value:.3f}" for value in result.test)
    return f"{where} {job.kind} images {job.images or 'all'} seed {job.seed} rate {result.learning_rate}: {points}"
