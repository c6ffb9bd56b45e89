"""Tables of an evaluation: Markdown for people, JSON for programs."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

from ghn_service.training.evaluate import Evaluation, FineTuned, ZeroShot
from ghn_service.training.fine_tune import mean_and_error


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


def fine_tune_summary(results: Sequence[FineTuned], budgets: Sequence[int]) -> list[dict[str, Any]]:
    """Per data size and budget (and for no steps at all): both means, mean gap, share of wins, and steps saved."""
    rows: list[dict[str, Any]] = []
    for images, members in _by(results, "images"):
        comparisons = [item.comparison for item in members]
        for step in (0, *budgets):
            gaps = [item.gap(step) for item in comparisons]
            saved = [float(item.steps_saved(step)) for item in comparisons]
            reached = [item.he.steps_to_reach(item.predicted.at(step)) is not None for item in comparisons]
            rows.append(
                {
                    "images": images,
                    "step": step,
                    "runs": len(members),
                    "predicted": mean_and_error([item.predicted.at(step) for item in comparisons]),
                    "he": mean_and_error([item.he.at(step) for item in comparisons]),
                    "gap": mean_and_error(gaps),
                    "wins": sum(gap > 0 for gap in gaps) / len(gaps),
                    "steps_saved": mean_and_error(saved),
                    "never_reached": sum(not item for item in reached),
                }
            )
    return rows


def fine_tune_table(results: Sequence[FineTuned], budgets: Sequence[int]) -> str:
    """The fine-tuning comparison as Markdown; empty without results."""
    if not results:
        return ""
    lines = [
        "| training images | steps | runs | predicted start | He | gap | wins | steps saved | He never got there |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in fine_tune_summary(results, budgets):
        saved, error = row["steps_saved"]
        lines.append(
            f"| {row['images'] or 'all'} | {row['step']} | {row['runs']} | {_pair(row['predicted'])} "
            f"| {_pair(row['he'])} | {_pair(row['gap'])} | {100 * row['wins']:.0f}% "
            f"| {saved:.0f} ± {error:.0f} | {row['never_reached']} |"
        )
    return "\n".join(lines)


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
    parts = [
        "Zero-shot top-1 in percent, ± standard error of the mean over networks.\n\n"
        + zero_shot_table(evaluation.zero_shot)
    ]
    if reference := reference_table(evaluation.zero_shot):
        parts.append("Reference networks, zero-shot top-1 in percent.\n\n" + reference)
    if fine_tuned := fine_tune_table(evaluation.fine_tuned, evaluation.plan.fine_tune.budgets):
        parts.append(
            "Fine-tuning from predicted weights and from He initialisation; top-1 in percent on test images, learning "
            "rates of each side chosen on validation images.\n\n" + fine_tuned
        )
    if novelty := novelty_line(evaluation.zero_shot):
        parts.append("Distance to the training networks' predictions.\n\n" + novelty)
    if evaluation.skipped:
        parts.append(f"{evaluation.skipped} networks were left out: too expensive, or not made for this size of image.")
    return "\n\n".join(parts) + "\n"


def json_report(evaluation: Evaluation) -> str:
    """Everything as JSON; values that were not measured are null."""
    return json.dumps(_without_nan(dataclasses.asdict(evaluation)), indent=1, allow_nan=False)


def _by(items: Iterable[Any], attribute: str) -> list[tuple[Any, list[Any]]]:
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(getattr(item, attribute), []).append(item)
    return list(groups.items())


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
