"""Tables of an evaluation: Markdown for people, JSON for programs."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from ghn_service.training.evaluation.fine_tune import Comparison, mean_and_error
from ghn_service.training.evaluation.results import ZeroShot
from ghn_service.training.evaluation.run import Evaluation


def markdown_report(evaluation: Evaluation) -> str:
    """Everything as one Markdown page."""
    zero_shot = evaluation.zero_shot
    if not evaluation.jobs and not zero_shot:
        return "Stopped before a network was chosen: nothing is measured. --out keeps what was read for next time.\n"
    parts = []
    if evaluation.finished < evaluation.jobs:
        parts.append(f"Stopped early: {evaluation.finished} of {evaluation.jobs} measurements are done.")
        parts.append(f"Not measured: {', '.join(f'{count} {what}' for what, count in evaluation.missing.items())}.")
    if zero_shot:
        parts += _zero_shot_parts(evaluation)
    if references := [item for item in zero_shot if item.split == "reference"]:
        rows = [
            (item.name, *(f"{100 * value:.1f}" for value in (item.batch, item.recalibrated, item.he_batch)))
            for item in references
        ]
        parts.append("Reference networks, zero-shot top-1 in percent.")
        parts.append(_table(("network", "batch statistics", "recalibrated", "He"), rows))
    if shapes := shape_table(zero_shot):
        parts.append(
            "Zero-shot top-1 in percent by depth and width, and mean cosine between layers of one role; all splits."
        )
        parts.append(shapes)
    if evaluation.fine_tuned:
        parts += _fine_tune_parts(evaluation)
    if novelty := _novelty_lines(zero_shot):
        parts.append("Distance to the training networks' predictions.")
        parts.append("\n".join(novelty))
    return "\n\n".join([*parts, _left_out(evaluation)]) + "\n"


def json_report(evaluation: Evaluation) -> str:
    """Everything as JSON; values that were not measured are null."""
    text = json.dumps(dataclasses.asdict(evaluation))
    return json.dumps(json.loads(text, parse_constant=lambda name: None), indent=1, allow_nan=False)


def _zero_shot_parts(evaluation: Evaluation) -> list[str]:
    """Protocol, and accuracy per split in percent: mean and standard error, best and worst, and He initialisation."""
    settings = evaluation.settings
    test = _count(evaluation, "test", settings.test_images)
    calibration = _count(evaluation, "training", settings.calibration_images)
    caption = (
        f"Zero-shot top-1 in percent on {test:,} test images, ± standard error of the mean over networks. "
        "Batch statistics: BatchNorm normalises each whole batch of 64 test images with its own statistics. "
        f"Recalibrated: its statistics are measured on {calibration:,} training images, then each test image stands "
        f"alone. He: He initialisation under batch statistics. Passes in {settings.zero_shot_precision}."
    )
    header = ("split", "networks", "batch statistics: mean ± s.e.", "best", "worst", "recalibrated: mean ± s.e.", "He")
    rows = [
        (
            split,
            len(members),
            _percent(item.batch for item in members),
            f"{100 * max(item.batch for item in members):.1f}",
            f"{100 * min(item.batch for item in members):.1f}",
            _percent(item.recalibrated for item in members),
            _percent(item.he_batch for item in members),
        )
        for split, members in _by(evaluation.zero_shot, "split")
    ]
    return [caption, _table(header, rows)]


DEPTHS, WIDTHS = (0, 10, 20, 40, 80), (0, 16, 32, 64, 128)


def shape_table(results: Sequence[ZeroShot]) -> str:
    """Zero-shot accuracy by depth and by width in percent, and how alike predicted layers of one role are."""
    rows: list[tuple[object, ...]] = []
    for attribute, bounds in (("layers", DEPTHS), ("width", WIDTHS)):
        for least, most in zip(bounds, (*bounds[1:], math.inf), strict=True):
            members = [item for item in results if least < getattr(item, attribute) <= most]
            if not members:
                continue
            cosines = [item.likeness for item in members if math.isfinite(item.likeness)]
            name = f"more than {least}" if most == math.inf else f"{least + 1} to {most}"
            what = "layers" if attribute == "layers" else "channels in the first"
            accuracy = _percent(item.batch for item in members)
            rows.append((f"{name} {what}", len(members), accuracy, f"{fmean(cosines):.2f}" if cosines else ""))
    return _table(("", "networks", "batch statistics: mean ± s.e.", "cosine of one role"), rows)


def fine_tune_summary(results: Sequence[Comparison], budgets: Sequence[int]) -> list[dict[str, Any]]:
    """Per data size and budget (and for no steps at all): both means, mean gap, share of wins, and steps saved.

    Seeds of one network are averaged first; means, errors and wins are over networks.
    """
    rows: list[dict[str, Any]] = []
    for images, members in _by(results, "images"):
        networks = [seeds for _, seeds in _by(members, "name")]
        for step in (0, *budgets):
            # (predicted, He, gap, steps saved) of each run, averaged over the seeds of each network
            values = [
                [
                    fmean(run.predicted.at(step) for run in seeds),
                    fmean(run.he.at(step) for run in seeds),
                    fmean(run.gap(step) for run in seeds),
                    fmean(run.steps_saved(step) for run in seeds),
                ]
                for seeds in networks
            ]
            predicted, he, gap, saved = zip(*values, strict=True)
            rows.append(
                {
                    "images": images,
                    "step": step,
                    "networks": len(networks),
                    "runs": len(members),
                    "predicted": mean_and_error(predicted),
                    "he": mean_and_error(he),
                    "gap": mean_and_error(gap),
                    "wins": sum(value > 0 for value in gap) / len(gap),
                    "steps_saved": mean_and_error(saved),
                    "never_reached": sum(run.he.steps_to_reach(run.predicted.at(step)) is None for run in members),
                }
            )
    return rows


def _fine_tune_parts(evaluation: Evaluation) -> list[str]:
    """Protocol and results of the fine-tuning comparison."""
    settings = evaluation.settings
    rule = settings.fine_tune
    rates = ", ".join(f"{rate:g}" for rate in rule.learning_rates)
    caption = (
        "Fine-tuning from predicted weights and from He initialisation: networks of split test; SGD, momentum 0.9, "
        f"weight decay {rule.weight_decay:g}, constant rate, batches of {rule.batch_size}, the same for both sides. "
        f"Each side's rate: the best of {rates} on {_count(evaluation, 'validation', settings.validation_images):,} "
        f"validation images after {rule.choose_at} steps with seed {settings.seeds[0]}. Top-1 in percent on "
        f"{_count(evaluation, 'test', settings.fine_tune_test_images):,} test "
        "images (whole batches of 64) under batch statistics, ± standard error over networks, whose seeds are averaged "
        "first. Steps saved: "
        "how many more steps He initialisation needs to be as good; where it does not get there in "
        f'{max(rule.longest, *rule.budgets)} steps ("never reached", in runs), that number counts, so the mean is a '
        "lower bound."
    )
    columns = ("predicted start", "He", "gap", "wins", "steps saved", "never reached")
    rows = [
        (
            _count(evaluation, "training", row["images"]) or "all",
            row["step"],
            f"{row['networks']} ({row['runs']})",
            *(_pair(row[side]) for side in ("predicted", "he", "gap")),
            f"{100 * row['wins']:.0f}%",
            "{:.0f} ± {:.0f}".format(*row["steps_saved"]),
            row["never_reached"],
        )
        for row in fine_tune_summary(evaluation.fine_tuned, rule.budgets)
    ]
    return [caption, _table(("images", "steps", "networks (runs)", *columns), rows)]


def _novelty_lines(results: Sequence[ZeroShot]) -> list[str]:
    """The honesty check in one sentence per split that has it."""
    lines = []
    for split, members in _by([item for item in results if math.isfinite(item.novelty)], "split"):
        distance, covered = fmean(item.novelty for item in members), fmean(item.covered for item in members)
        lines.append(
            f"- {split}: median relative distance to the nearest training network's tensor {distance:.3f} "
            f"({100 * covered:.0f}% of the values have one of equal shape and kind); "
            f"own weights {_percent(item.batch for item in members)}, "
            f"copies of the nearest {_percent(item.copied for item in members)}"
        )
    return lines


def _count(evaluation: Evaluation, part: str, wanted: int) -> int:
    """How many of the wanted images there are."""
    return min(wanted, evaluation.num_images.get(part, wanted))


def _left_out(evaluation: Evaluation) -> str:
    """Which networks were not measured, and why."""
    sentences = []
    if evaluation.pool_size:
        counts = ", ".join(f"{count} of {split}" for split, count in evaluation.in_training_pool.items()) or "none"
        sentences.append(
            f"Networks of random splits whose graph is one of the {evaluation.pool_size:,} training networks were "
            f"passed over: {counts}; the next index took their place."
        )
        if evaluation.pool_known < evaluation.pool_size:
            sentences.append(f"Time sufficed to compare with the first {evaluation.pool_known:,} of those alone.")
    elif evaluation.jobs:
        sentences.append("The checkpoint does not name its training networks, so equal graphs were not passed over.")
    if evaluation.skipped:
        sentences.append(
            f"{evaluation.skipped} networks were left out: more than {evaluation.settings.largest_macs:,.0f} "
            "multiply-adds, or not made for this size of image."
        )
    return " ".join(sentences)


def _by(items: Iterable[Any], attribute: str) -> list[tuple[Any, list[Any]]]:
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(getattr(item, attribute), []).append(item)
    return list(groups.items())


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    return "\n".join(markdown_table(header, rows))


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a Markdown table; none without rows."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return ["| " + " | ".join(header) + " |", "|---" * len(header) + "|", *lines] if lines else []


def _percent(values: Iterable[float]) -> str:
    return _pair(mean_and_error(list(values)))


def _pair(pair: tuple[float, float]) -> str:
    return f"{100 * pair[0]:.1f} ± {100 * pair[1]:.1f}"
