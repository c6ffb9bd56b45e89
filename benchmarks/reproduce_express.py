"""How wide a sparse random network has to be so that its norm layers express a target: ``make reproduce-express``.

For each sparsity and number of outputs, the channels per weight of a layer of 16 inputs at which the system of the
layer has full rank (``random_norm_network``), over seeds. Fills its part of ``docs/results.md``.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from benchmarks.experiment import fill_page
from ghn_client.finetune import express, random_norm_network
from ghn_client.finetune.express.pairing import express_width
from ghn_service.training.evaluation.report import markdown_table

INPUTS, OUTPUTS = 16, (1, 2, 4, 10, 16)
SPARSITIES = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9)


def rows(seeds: int) -> list[list[str]]:
    """One row for each number of outputs: first width tried, then median and largest width of full rank."""
    found = []
    for outputs in OUTPUTS:
        target, row = nn.Linear(INPUTS, outputs), [str(outputs)]
        for sparsity in SPARSITIES:
            widths = []
            for seed in range(seeds):
                generator = torch.Generator().manual_seed(seed)
                frozen = random_norm_network(target, sparsity=sparsity, generator=generator)
                express(target, frozen, inputs=torch.randn(50, INPUTS, generator=generator))  # raises if infeasible
                widths.append(frozen.get_parameter("inner.weight").shape[0] / (INPUTS * outputs))
            first = express_width(INPUTS, outputs, sparsity=sparsity) / (INPUTS * outputs)
            row.append(f"{first:.2f}, {statistics.median(widths):.2f}, {max(widths):.2f}")
        found.append(row)
    return found


def main(words: Sequence[str] | None = None) -> None:
    """Measures, prints the table and writes it into the page of results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder of results.md")
    parser.add_argument("--seeds", type=int, default=20)
    arguments = parser.parse_args(words)
    torch.set_num_threads(1)
    header = ["outputs", *(f"sparsity {sparsity:g}" for sparsity in SPARSITIES)]
    fill_page(arguments.output, {"express: width": markdown_table(header, rows(arguments.seeds))}, {})


if __name__ == "__main__":
    main()
