"""The example: what it grows starts where the small network stopped."""

from __future__ import annotations

import pytest

from tests.finetune.public_libraries import example


def test_a_grown_network_starts_ahead(capsys: pytest.CaptureFixture[str]) -> None:
    start, grown, default = example("transfer").compare(steps_of_source=40, steps=2)
    assert start > 0.5
    assert min(start, grown) > default
    assert "exactly" in capsys.readouterr().out
