"""Collects one row per network of the zoo, and writes them as a page when ``--zoo-table FILE`` is given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROWS_KEY = "zoo_row"


class ZooTable:
    """Gathers the rows of this run, from all worker processes, as their tests are reported."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict] = []
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and "test_zoo" in report.nodeid:
            self.failed.append(report.nodeid.partition("[")[2].rstrip("]"))
        if report.when == "call":
            self.rows += [json.loads(value) for key, value in report.user_properties if key == ROWS_KEY]

    def pytest_sessionfinish(self) -> None:
        from tests.zoo.table import render_table

        if self.rows:
            self.path.write_text(render_table(self.rows, self.failed))


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("zoo_table", default=None)
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(ZooTable(Path(path)))
