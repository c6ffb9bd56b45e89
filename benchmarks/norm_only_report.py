"""The document and the plot of ``benchmarks.reproduce_norm_only``."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

from benchmarks.cells import Cell
from benchmarks.charts import line_chart

#: Upper end of each of the 20 bins of |gamma|; the last one also holds all larger scales.
BIN_WIDTH = 0.1


def report(controls: list[Cell], story: list[Cell], settings: dict[str, Any]) -> tuple[str, str]:
    """The document in Markdown and the histograms of scales as SVG.

    Args:
        controls: Results of every start, strategy and seed, the strategies in the order that is expected.
        story: Results of the second table; may be empty.
        settings: Sizes of the run.
    """
    text = [*_introduction(controls, settings), *_control_table(controls), "", *_verdicts(controls), ""]
    text += ["![share of scales by size](norm_only_results.svg)", "", *_story_table(story)]
    chart = line_chart("Scales after training", _histograms(controls), x_label="|gamma|", y_label="share of channels")
    return "\n".join(text), chart


def _introduction(controls: list[Cell], settings: dict[str, Any]) -> list[str]:
    seeds = ", ".join(str(seed) for seed in _values(controls, "seed"))
    digests = {cell["checkpoint"] for cell in controls if "checkpoint" in cell}
    hypernetwork = f" The hypernetwork is the one whose file has SHA-256 `{digests.pop()}...`." if digests else ""
    return [
        "# Norm-only tuning and its controls",
        "",
        "Written by `make reproduce-norm-only`: a ResNet-14 with 8, 16 and 32 channels,",
        f"{settings['images']:,} training images of CIFAR-10, {settings['epochs']} epochs, {settings['test']:,} test",
        f"images, seeds {seeds}; mean and standard deviation.{hypernetwork}",
        "A much smaller setting than that of arXiv:2003.00152: the order is what is compared, not the percentages.",
        "A channel counts as disabled where |gamma| < 0.01.",
        "",
    ]


def _control_table(controls: list[Cell]) -> list[str]:
    rows = [
        "| start | tuned | numbers | accuracy before | accuracy | disabled channels | with those at zero |",
        "|---|---|---|---|---|---|---|",
    ]
    for start in _values(controls, "start"):
        for strategy in _values(controls, "strategy"):
            rows.append(_control_row(start, strategy, _chosen(controls, start, strategy)))
    return rows


def _control_row(start: str, strategy: str, group: list[Cell]) -> str:
    mean = partial(_mean, group)
    disabled = zeroed = "-"
    if "disabled" in group[0]:
        disabled, zeroed = f"{mean('disabled'):.1%}", f"{mean('accuracy_zeroed'):.2%}"
    spread = statistics.stdev(cell["accuracy"] for cell in group) if len(group) > 1 else 0.0
    return (
        f"| {start} | {strategy} | {group[0]['trainable']:,} | {mean('accuracy_before'):.2%} |"
        f" {mean('accuracy'):.2%} ± {spread:.2%} | {disabled} | {zeroed} |"
    )


def _verdicts(controls: list[Cell]) -> list[str]:
    """Whether the expected order holds for each start, also where it does not."""
    expected = _values(controls, "strategy")
    lines = []
    for start in _values(controls, "start"):
        means = {name: _mean(_chosen(controls, start, name), "accuracy") for name in expected}
        order = sorted(means, key=lambda name: -means[name])
        verdict = "holds" if order == expected else "does not hold"
        lines.append(f"- {start}: {' > '.join(order)}. The expected order {verdict}.")
    return lines


def _histograms(controls: list[Cell]) -> dict[str, list[tuple[float, float]]]:
    """Share of all scales per bin, by strategy and start; the middle of each bin on the x axis."""
    lines = {}
    for start in _values(controls, "start"):
        for strategy in _values(controls, "strategy"):
            group = _chosen(controls, start, strategy)
            if "histogram" in group[0]:
                counts = [sum(values) for values in zip(*(cell["histogram"] for cell in group), strict=True)]
                shares = [count / max(sum(counts), 1) for count in counts]
                lines[f"{strategy}, {start.partition(',')[0]}"] = [
                    (BIN_WIDTH * (i + 0.5), share) for i, share in enumerate(shares)
                ]
    return lines


def _story_table(story: list[Cell]) -> list[str]:
    if not story:
        return []
    rows = [
        "## Three architectures, two starts, four strategies",
        "",
        "Same images, epochs and batches, one seed. Random weights start with scales of one here. Seconds are",
        "processor time of training; a delta is what has to be stored beside the start.",
        "",
        "| network | parameters | start | strategy | accuracy before | accuracy | trained numbers | delta | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for network in _values(story, "network"):
        cells = [cell for cell in story if cell["network"] == network]
        total = max(cell["trainable"] for cell in cells if cell["strategy"] == "all")
        rows += [
            f"| {network} | {total:,} | {cell['start']} | {cell['strategy']} | {cell['accuracy_before']:.2%} |"
            f" {cell['accuracy']:.2%} | {cell['trainable']:,} | {cell['delta_bytes'] / 1024:.1f} KiB |"
            f" {cell['seconds']:.0f} |"
            for cell in cells
        ]
    return [*rows, ""]


def _values(cells: list[Cell], key: str) -> list[Any]:
    """The different values of a key, in order."""
    return list(dict.fromkeys(cell[key] for cell in cells))


def _chosen(cells: list[Cell], start: str, strategy: str) -> list[Cell]:
    return [cell for cell in cells if (cell["start"], cell["strategy"]) == (start, strategy)]


def _mean(group: list[Cell], key: str) -> float:
    return float(statistics.fmean(cell[key] for cell in group))
