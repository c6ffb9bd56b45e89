"""The example: what it grows starts where the small network stopped."""

from __future__ import annotations

import re

import pytest

from tests.finetune.public_libraries import example


def test_a_grown_network_starts_ahead(capsys: pytest.CaptureFixture[str]) -> None:
    example("transfer").main(["--images", "640", "--steps", "30"])
    *_, transfer, figures = capsys.readouterr().out.strip().splitlines()
    assert "exactly" in transfer
    start, grown, default = (float(figure) for figure in re.findall(r"(\d+\.\d)%", figures))
    assert start > 30
    assert min(start, grown) > default
