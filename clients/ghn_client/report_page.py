"""The page of a prediction: one self-contained HTML file, drawn in the browser from the JSON inside it.

The verdict comes first, then a picture of the network that says where each weight comes from, then the measures of
diversity where a report was asked for.
"""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ghn_client.atomic_file import write_file

if TYPE_CHECKING:
    from ghn_client.prediction import Prediction


def describe_prediction(prediction: Prediction) -> dict[str, Any]:
    """What the page shows: the report, and without one what the file says, its tensors in a chain."""
    metadata = prediction.metadata
    layers: dict[str, list[Any]] = {}
    for name, tensor in prediction.items():
        note = prediction.notes[name]
        shown = note.torch_name or name
        layer = layers.setdefault(shown.rpartition(".")[0] or shown, ["layer"])
        layer.append([shown, list(tensor.shape), note.origin, None])
    chain = {"nodes": [["input"], *layers.values()], "edges": [[i, i + 1] for i in range(len(layers))], "others": []}
    return {
        "prediction": {"model": metadata.model, "seed": metadata.seed},
        "network": {"num_parameters": prediction.num_parameters},
        "trust": dataclasses.asdict(prediction.trust),
        "graph": chain,
        **(prediction.report or {}),
    }


def render_page(document: Mapping[str, Any]) -> str:
    """The page of a report, or of what ``describe_prediction`` gives."""
    template = resources.files("ghn_client").joinpath("report_template.html").read_text(encoding="utf-8")
    # Inside a script element only "</" and "<!--" could end or change it; JSON allows both to be escaped.
    body = json.dumps(document, separators=(",", ":")).replace("<", "\\u003c")
    return template.replace("__REPORT__", body, 1)


def embed_page(page: str, *, height: int = 720) -> str:
    """The page as an element of a notebook, with its own styles and scripts."""
    return f'<iframe srcdoc="{html.escape(page)}" style="width:100%;height:{height}px;border:0"></iframe>'


def write_report(prediction: Prediction, path: Path) -> None:
    """Writes the page, or the report as JSON, by the name of the file."""
    if path.suffix.lower() == ".html":
        text = prediction.report_page()
    else:
        text = json.dumps(prediction.report, indent=2, ensure_ascii=False) + "\n"
    write_file(path, text)
