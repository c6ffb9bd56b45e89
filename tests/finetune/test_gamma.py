"""Scales near zero are counted, and the score with them at zero is measured."""

from __future__ import annotations

import pytest

from ghn_client.errors import InvalidOptionError, UnsupportedModuleError
from ghn_client.finetune.norm_only import gamma_report
from tests.finetune.networks import ResidualNetwork, mlp


def test_report_counts_scales_near_zero():
    network = ResidualNetwork(8)
    network.norm.weight.data[:2] = 1e-3
    report = gamma_report(network, evaluate=lambda module: float(module.norm.weight.data.eq(0).sum()))
    assert report.layers[0].disabled == 2
    assert report.share == pytest.approx(2 / 40)
    assert (report.score, report.score_zeroed) == (0.0, 2.0)
    assert network.norm.weight.data[0] == pytest.approx(1e-3)
    assert all(sum(layer.histogram) == layer.channels for layer in report.layers)
    assert "5.0%" in str(report)


def test_report_refuses_networks_without_scales_and_bad_thresholds():
    with pytest.raises(UnsupportedModuleError):
        gamma_report(mlp(3, 3))
    with pytest.raises(InvalidOptionError):
        gamma_report(ResidualNetwork(8), threshold=-1.0)
