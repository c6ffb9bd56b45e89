"""The tables of ``benchmarks.calibrate_trust``: gains by verdict in two halves, and classifiers side by side."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from benchmarks.calibrate_trust import HE, OWN, PREDICTED, change_head, gain_table, head_table


class Judge:
    """A client that calls recurrent networks far and all others typical."""

    def analyze(self, module: nn.Module, example: torch.Tensor) -> Any:
        assert module(example).shape == (2, 10)
        is_recurrent = any(isinstance(part, nn.RNNBase) for part in module.modules())
        return SimpleNamespace(trust=SimpleNamespace(verdict="far" if is_recurrent else "typical"))


def side(name: str, start: str, *scores: float) -> dict[str, Any]:
    return {"network": f"own/{name}", "start": start, "100": scores[0], "500": scores[1]}


def test_gains_are_told_by_verdict_and_half() -> None:
    measured = [side(name, HE, 0.3, 0.4) for name in OWN]
    measured += [side("lstm", PREDICTED, 0.3, 0.35), side("tanh_perceptron", PREDICTED, 0.5, 0.6)]
    rows = [row.split(" | ") for row in gain_table(measured, Judge())[2:]]
    found = {(row[0].strip("| "), row[1]): row[2:] for row in rows}
    assert found["thresholds", "far"][:2] == ["1", "+0.0 (0)"]
    assert found["thresholds", "far"][2].startswith("-5.0 (0)")
    assert found["others", "typical"][:2] == ["1", "+20.0 (1)"]
    assert found["others", "far"][0] == "0"


def test_a_network_without_both_sides_does_not_count() -> None:
    measured = [side("lstm", HE, 0.3, 0.4), {"network": "own/lstm", "start": PREDICTED, "error": "too small"}]
    assert all(" | 0 | - | - |" in row for row in gain_table(measured, Judge())[2:])


def test_classifiers_stand_side_by_side() -> None:
    cells = [{"classes": 5, "network": "n", "head": head, "100": 0.5, "500": 0.75} for head in ("copies", "reset")]
    assert head_table(cells)[2] == "| 5 | n | 50.0 / 75.0 | 50.0 / 75.0 | - |"


def test_heads_are_kept_drawn_anew_or_disturbed() -> None:
    module = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 20))
    kept = module[1].weight.clone()
    change_head(module, "copies")
    assert torch.equal(module[1].weight, kept)
    change_head(module, "noise")
    assert 0.3 < float((module[1].weight - kept).norm() / kept.norm()) < 0.7
    change_head(module, "reset")
    assert abs(float(module[1].weight.std()) - 1 / 8) < 0.02
    assert not module[1].bias.any()
