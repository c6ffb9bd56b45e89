"""The HTML page of a diversity report: self-contained, and with the report inside unharmed."""

from __future__ import annotations

import json
import re

from ghn_client.cli.tables import render_report_html

REPORT = {"format": "ghn-prediction-report/1", "layers": [{"parameter": "</script><script>alert(1)</script>"}]}


def embedded_report(page: str) -> dict:
    (body,) = re.findall(r'<script type="application/json" id="report">(.*?)</script>', page, flags=re.DOTALL)
    return json.loads(body)


def test_the_report_is_inside_the_page_unchanged() -> None:
    assert embedded_report(render_report_html(REPORT)) == REPORT


def test_the_page_requests_nothing_from_outside() -> None:
    page = render_report_html(REPORT)
    assert not re.search(r"""(src|href)\s*=|url\(|@import|fetch\(|XMLHttpRequest|https?://""", page)


def test_names_from_a_file_cannot_become_code() -> None:
    assert "<script>alert(1)" not in render_report_html(REPORT)
