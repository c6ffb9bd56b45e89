"""Tables of an evaluation: Markdown for people, JSON for programs."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from ghn_service.training.evaluation.fine_tune import Comparison, mean_and_error
from ghn_service.training.evaluation.results import FineTuned, ZeroShot
from ghn_service.training.evaluation.run import Evaluation
from ghn_service.training.evaluation.settings import EvaluationSettings


def zero_shot_table(results: Sequence[ZeroShot]) -> str:
    """Zero-shot accuracy per split in percent: mean and standard error, best and worst, and He initialisation."""
    lines = [
        "| split | networks | batch statistics: mean ± s.e. | best | worst | recalibrated: mean ± s.e. | He |",
        "|---|---|---|---|---|---|---|",
    ]
    for split, members in _by(results, "split"):
        batch = [item.batch for item in members]
        lines.append(
            f"| {split} | {len(members)} | {_percent(batch)} | {100 * max(batch):.1f} | {100 * min(batch):.1f} "
            f"| {_percent([item.recalibrated for item in members])} | {_percent([item.he_batch for item in members])} |"
        )
    return "\n".join(lines)


def reference_table(results: Sequence[ZeroShot]) -> str:
    """Zero-shot accuracy of each reference network in percent; empty if there are none."""
    members = [item for item in results if item.split == "reference"]
    if not members:
        return ""
    lines = ["| network | batch statistics | recalibrated | He |", "|---|---|---|---|"]
    lines += [
        f"| {item.name} | {100 * item.batch:.1f} | {100 * item.recalibrated:.1f} | {100 * item.he_batch:.1f} |"
        for item in members
    ]
    return "\n".join(lines)


DEPTHS, WIDTHS = (0, 10, 20, 40, 80), (0, 16, 32, 64, 128)


def shape_table(results: Sequence[ZeroShot]) -> str:
    """Zero-shot accuracy by depth and by width in percent, and how alike predicted layers of one role are."""
    lines = ["| | networks | batch statistics: mean ± s.e. | cosine of one role |", "|---|---|---|---|"]
    for attribute, bounds in (("layers", DEPTHS), ("width", WIDTHS)):
        for least, most in zip(bounds, (*bounds[1:], math.inf), strict=True):
            members = [item for item in results if least < getattr(item, attribute) <= most]
            if not members:
                continue
            cosines = [item.likeness for item in members if math.isfinite(item.likeness)]
            name = f"more than {least}" if most == math.inf else f"{least + 1} to {most}"
            what = "layers" if attribute == "layers" else "channels in the first"
            lines.append(
                f"| {name} {what} | {len(members)} | {_percent([item.batch for item in members])} "
                f"| {f'{fmean(cosines):.2f}' if cosines else ''} |"
            )
    return "\n".join(lines) if len(lines) > 2 else ""


def fine_tune_summary(results: Sequence[FineTuned], budgets: Sequence[int]) -> list[dict[str, Any]]:
    """Per data size and budget (and for no steps at all): both means, mean gap, share of wins, and steps saved.

    Seeds of one network are averaged first; means, errors and wins are over networks.
    """
    rows: list[dict[str, Any]] = []
    for images, members in _by(results, "images"):
        networks = [[item.comparison for item in seeds] for _, seeds in _by(members, "name")]
        runs = [comparison for seeds in networks for comparison in seeds]
        for step in (0, *budgets):
            # (predicted, He, gap, steps saved) of each run, averaged over the seeds of each network
            values = [
                [fmean(column) for column in zip(*(_at(comparison, step) for comparison in seeds), strict=True)]
                for seeds in networks
            ]
            predicted, he, gap, saved = zip(*values, strict=True)
            rows.append(
                {
                    "images": images,
                    "step": step,
                    "networks": len(networks),
                    "runs": len(runs),
                    "predicted": mean_and_error(predicted),
                    "he": mean_and_error(he),
                    "gap": mean_and_error(gap),
                    "wins": sum(value > 0 for value in gap) / len(gap),
                    "steps_saved": mean_and_error(saved),
                    "never_reached": sum(run.he.steps_to_reach(run.predicted.at(step)) is None for run in runs),
                }
            )
    return rows


def fine_tune_table(results: Sequence[FineTuned], budgets: Sequence[int]) -> str:
    """The fine-tuning comparison as Markdown; empty without results."""
    if not results:
        return ""
    lines = [
        "| images | steps | networks (runs) | predicted start | He | gap | wins | steps saved | never reached |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in fine_tune_summary(results, budgets):
        saved, error = row["steps_saved"]
        lines.append(
            f"| {row['images'] or 'all'} | {row['step']} | {row['networks']} ({row['runs']}) "
            f"| {_pair(row['predicted'])} | {_pair(row['he'])} | {_pair(row['gap'])} | {100 * row['wins']:.0f}% "
            f"| {saved:.0f} ± {error:.0f} | {row['never_reached']} |"
        )
    return "\n".join(lines)


def zero_shot_caption(settings: EvaluationSettings) -> str:
    """The protocol of zero-shot scores in words."""
    return (
        f"Zero-shot top-1 in percent on {settings.test_images:,} test images, ± standard error of the mean over "
        "networks. "
        "Batch statistics: BatchNorm normalises each batch of 64 test images with its own statistics. Recalibrated: "
        f"its statistics are measured on {settings.calibration_images:,} training images, then each test image stands "
        f"alone. He: He initialisation under batch statistics. Passes in {settings.zero_shot_precision}."
    )


def fine_tune_caption(settings: EvaluationSettings) -> str:
    """The protocol of the fine-tuning comparison in words."""
    rule = settings.fine_tune
    rates = ", ".join(f"{rate:g}" for rate in rule.learning_rates)
    return (
        "Fine-tuning from predicted weights and from He initialisation: networks of split test; SGD, momentum 0.9, "
        f"weight decay {rule.weight_decay:g}, constant rate, batches of {rule.batch_size}, the same for both sides. "
        f"Each side's rate: the best of {rates} on {settings.validation_images:,} validation images after "
        f"{rule.choose_at} steps with seed {settings.seeds[0]}. Top-1 in percent on "
        f"{settings.fine_tune_test_images:,} test "
        "images (whole batches of 64) under batch statistics, ± standard error over networks, whose seeds are averaged "
        "first. Steps saved: "
        "how many more steps He initialisation needs to be as good; where it does not get there in "
        f'{max(rule.longest, *rule.budgets)} steps ("never reached", in runs), that number counts, so the mean is a '
        "lower bound."
    )


def novelty_line(results: Sequence[ZeroShot]) -> str:
    """The honesty check in one sentence per split that has it."""
    lines = []
    for split, members in _by(results, "split"):
        known = [item for item in members if math.isfinite(item.novelty)]
        if not known:
            continue
        distance = mean_and_error([item.novelty for item in known])[0]
        covered = mean_and_error([item.covered for item in known])[0]
        lines.append(
            f"- {split}: median relative distance to the nearest training network's tensor {distance:.3f} "
            f"({100 * covered:.0f}% of the values have one of equal shape and kind); "
            f"own weights {_percent([item.batch for item in known])}, "
            f"copies of the nearest {_percent([item.copied for item in known])}"
        )
    return "\n".join(lines)


def markdown_report(evaluation: Evaluation) -> str:
    """Everything as one Markdown page."""
    settings = evaluation.settings
    parts = []
    if evaluation.finished < evaluation.jobs:
        parts.append(f"Stopped early: {evaluation.finished} of {evaluation.jobs} measurements are done.")
    if evaluation.zero_shot:
        parts.append(zero_shot_caption(settings) + "\n\n" + zero_shot_table(evaluation.zero_shot))
    if reference := reference_table(evaluation.zero_shot):
        parts.append("Reference networks, zero-shot top-1 in percent.\n\n" + reference)
    if shapes := shape_table(evaluation.zero_shot):
        caption = (
            "Zero-shot top-1 in percent by depth and width, and mean cosine between layers of one role; all splits."
        )
        parts.append(caption + "\n\n" + shapes)
    if fine_tuned := fine_tune_table(evaluation.fine_tuned, settings.fine_tune.budgets):
        parts.append(fine_tune_caption(settings) + "\n\n" + fine_tuned)
    if novelty := novelty_line(evaluation.zero_shot):
        parts.append("Distance to the training networks' predictions.\n\n" + novelty)
    parts.append(left_out_line(evaluation))
    return "\n\n".join(parts) + "\n"


def left_out_line(evaluation: Evaluation) -> str:
    """Which networks were not measured, and why."""
    sentences = []
    if evaluation.pool_size:
        counts = ", ".join(f"{count} of {split}" for split, count in evaluation.in_training_pool.items()) or "none"
        sentences.append(
            f"Networks of random splits whose graph is one of the {evaluation.pool_size:,} training networks were "
            f"passed over: {counts}; the next index took their place."
        )
    else:
        sentences.append("The checkpoint does not name its training networks, so equal graphs were not passed over.")
    if evaluation.skipped:
        sentences.append(
            f"{evaluation.skipped} networks were left out: more than {evaluation.settings.largest_macs:,.0f} "
            "multiply-adds, or not made for this size of image."
        )
    return " ".join(sentences)


def json_report(evaluation: Evaluation) -> str:
    """Everything as JSON; values that were not measured are null."""
    return json.dumps(_without_nan(dataclasses.asdict(evaluation)), indent=1, allow_nan=False)


def _by(items: Iterable[Any], attribute: str) -> list[tuple[Any, list[Any]]]:
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(getattr(item, attribute), []).append(item)
    return list(groups.items())


def _at(run: Comparison, step: int) -> tuple[float, float, float, float]:
    return run.predicted.at(step), run.he.at(step), run.gap(step), run.steps_saved(step)


def _percent(values: Sequence[float]) -> str:
    return _pair(mean_and_error(values))


def _pair(pair: tuple[float, float]) -> str:
    return f"{100 * pair[0]:.1f} ± {100 * pair[1]:.1f}"


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return value
