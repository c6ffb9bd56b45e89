"""Options of the test suite."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--zoo-table", dest="zoo_table", help="write what the zoo's tests measured to this Markdown file")
