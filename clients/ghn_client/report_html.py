"""The diversity report as JSON, or as one self-contained HTML page, drawn in the browser from the JSON inside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from ghn_client.atomic_file import write_file
from ghn_client.errors import InvalidOptionError

_PLACEHOLDER = "__REPORT__"


def render_report_html(report: Mapping[str, Any]) -> str:
    """The page for a report of format ``ghn-diversity-report/1``."""
    template = resources.files("ghn_client").joinpath("report_template.html").read_text(encoding="utf-8")
    # Inside a script element only "</" and "<!--" could end or change it; JSON allows both to be escaped.
    body = json.dumps(report, separators=(",", ":")).replace("<", "\\u003c")
    return template.replace(_PLACEHOLDER, body, 1)


def write_report(report: Mapping[str, Any], path: Path) -> None:
    """Writes a report in the format that the name of the file asks for; it is there whole or not at all.

    Raises:
        InvalidOptionError: The name ends neither in ``.json`` nor in ``.html``.
        FileError: The file cannot be written.
    """
    if path.suffix.lower() not in (".json", ".html"):
        raise InvalidOptionError(f"expected a report as FILE.json or FILE.html, got {str(path)!r}", field="report")
    is_page = path.suffix.lower() == ".html"
    text = render_report_html(report) if is_page else json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    write_file(path, text)
