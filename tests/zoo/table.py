"""The page ``docs/zoo.md``, from the rows that the zoo's tests measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

INTRODUCTION = """\
# Networks that work

Written by `make zoo`. Each network is built without weights, exported by `export_architecture`, predicted by a GHN-3
with seeded random weights (so these figures say what is *understood*, not how good the weights are), loaded strictly,
checked to be finite, and trained for one step. *Predicted* is the share of trainable scalars that the hypernetwork
gives; the rest gets a standard initialiser, which the reply names. *Without copies*: of wider layers only a block
of 64 x 64 channels is predicted, and repeated to fill them (`tiled`). Seconds are processor time of the process, client
and server: *export* from module to structure, *predict* from bytes to weights in the client.
"""

HEADER = (
    "| package | network | input | parameters | nodes | predicted | without copies | fallback rules "
    "| export, s | predict, s |"
)
RULE = "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: |"


def render_table(rows: Iterable[Mapping[str, Any]], failed: Iterable[str]) -> str:
    """The page, sorted by package and name."""
    ordered = sorted(rows, key=lambda row: (row["package"], row["name"].lower()))
    failures = sorted(set(failed))
    summary = f"{len(ordered)} networks work"
    summary += f", {len(failures)} fail: {', '.join(failures)}." if failures else "."
    return "\n".join([INTRODUCTION, summary, "", HEADER, RULE, *map(_render_row, ordered)]) + "\n"


def _render_row(row: Mapping[str, Any]) -> str:
    rules = ", ".join(row["rules"]) or "-"
    return (
        f"| {row['package']} | {row['name']} | {row['image_size']} | {row['parameters'] / 1e6:.2f} M | {row['nodes']} "
        f"| {row['predicted']:.2%} | {row['distinct']:.1%} | {rules} | {row['export_s']:.1f} | {row['predict_s']:.2f} |"
    )
