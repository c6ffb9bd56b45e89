"""Statistics of the networks: ``python -m architectures [--split NAME] [--count N] [--size SIZE] [--time]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from architectures.generator import SIZES, SPLITS, sample_architecture
from architectures.registry import ARCHITECTURES
from architectures.statistics import QUANTILES, Summary, measure_step_s, summarise, summarise_sizes


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table of sizes for each split asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m architectures", description="Sizes of reference and random networks."
    )
    parser.add_argument("--split", choices=list(SPLITS), action="append", help="split to describe; all by default")
    parser.add_argument("--count", type=int, default=50, help="networks to draw from each split")
    parser.add_argument("--size", choices=list(SIZES), help="draw from this range of costs only")
    parser.add_argument("--time", action="store_true", help="measure a forward and backward pass, on one thread")
    parser.add_argument("--batch-size", type=int, default=64, help="images of a measured pass")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    _print_row("split", "quantity", "mean", *(f"{share:.0%}" for share in QUANTILES))
    for split in options.split or SPLITS:
        count = min(options.count, len(ARCHITECTURES)) if split == "reference" else options.count
        networks = [sample_architecture(split, index, size=options.size) for index in range(count)]
        summaries = summarise_sizes(networks)
        if options.time:
            steps = (1e3 * measure_step_s(network, batch_size=options.batch_size) for network in networks)
            summaries.append(summarise("ms of CPU per step", steps))
        for summary in summaries:
            _print_summary(split, summary)


def _print_summary(split: str, summary: Summary) -> None:
    _print_row(split, summary.name, *(f"{value:,.4g}" for value in (summary.mean, *summary.values)))


def _print_row(split: str, quantity: str, *values: str) -> None:
    sys.stdout.write(f"{split:<10}{quantity:<24}" + "".join(f"{value:>10}" for value in values) + "\n")


if __name__ == "__main__":
    main()
