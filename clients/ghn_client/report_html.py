"""The diversity report as one self-contained HTML page, drawn in the browser from the JSON inside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

_PLACEHOLDER = "__REPORT__"


def render_report_html(report: Mapping[str, Any]) -> str:
    """The page for a report of format ``ghn-diversity-report/1``."""
    template = resources.files("ghn_client").joinpath("report_template.html").read_text(encoding="utf-8")
    # Inside a script element only "</" and "<!--" could end or change it; JSON allows both to be escaped.
    body = json.dumps(report, separators=(",", ":")).replace("<", "\\u003c")
    return template.replace(_PLACEHOLDER, body, 1)
