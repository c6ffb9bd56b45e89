"""What the reproductions of this part write, from results that are made up: tables, verdicts and plots."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest
import torch

from benchmarks import reproduce_diversity, reproduce_low_rank
from benchmarks.charts import bar_chart
from ghn_client.finetune.factored import FactoredLayer


def low_rank_cells(*, gain: float) -> list[dict]:
    """Two seeds of each method with and without BatchNorm; ``function`` is better by ``gain`` without."""
    return [
        {
            "batchnorm": batchnorm,
            "size": 2.0,
            "method": method,
            "seed": seed,
            "rate": 0.03,
            "accuracy": 0.1 + 0.3 * batchnorm + 0.001 * seed + (gain * (1 + 0.1 * seed)) * is_better,
            "parameters": 1000,
        }
        for batchnorm in (False, True)
        for method in ("spectral", "function")
        for seed in (0, 1)
        for is_better in [method == "function" and not batchnorm]
    ]


@pytest.mark.parametrize(("gain", "word"), [(0.1, "helps"), (-0.05, "hurts"), (0.0, "no difference")])
def test_a_verdict_follows_the_paired_differences(gain: float, word: str) -> None:
    without, with_norm = reproduce_low_rank.verdicts(low_rank_cells(gain=gain))
    assert word in without
    assert "no difference" in with_norm


def test_runs_that_did_not_learn_are_counted() -> None:
    rows = list(reproduce_low_rank.accuracy_table(low_rank_cells(gain=0.1)))
    assert "| 2, 0 |" in rows[2]
    assert "| 0, 0 |" in rows[3]


def test_the_networks_of_one_seed_start_from_the_same_dense_weights() -> None:
    networks = []
    for method in ("spectral", "function"):
        torch.manual_seed(3)
        dense = reproduce_low_rank.build_network(normalize=False)
        networks.append(reproduce_low_rank.factored_network(dense, size=0.25, method=method))
    first, second = ([m for m in n.modules() if isinstance(m, FactoredLayer)] for n in networks)
    assert len(first) == 5
    for spectral, function in zip(first, second, strict=True):
        torch.testing.assert_close(spectral.v.weight, function.v.weight)
        assert not torch.equal(spectral.u.weight, function.u.weight)


def diversity_cells() -> list[dict]:
    accuracies = {"He": 0.2, "GHN": 0.4, "GHN + auto": 0.3}
    return [
        {
            "network": "vit_small",
            "start": start,
            "seed": seed,
            "rate": 0.01,
            "accuracy": mean + 0.01 * seed,
            "before": 0.1,
        }
        for start, mean in accuracies.items()
        for seed in (0, 1)
    ]


def test_the_best_start_is_bold_and_steps_that_hurt_are_called_so() -> None:
    rows = reproduce_diversity.group_rows(diversity_cells())
    assert "**40.5 ± 0.5**" in list(reproduce_diversity.accuracy_table(rows, "accuracy"))[2]
    (row,) = reproduce_diversity.differences(rows)
    assert row == ["vit_small", "+20.0 ± 0.0", "-", "-", "-", "-10.0 ± 0.0"]


@pytest.mark.parametrize("network", reproduce_diversity.NETWORKS)
def test_the_networks_have_layers_beyond_a_predicted_block(network: str) -> None:
    specs = reproduce_diversity.find_network(network).graph().parameters()
    assert max(spec.shape[0] for spec in specs) > 64


def test_a_plot_is_valid_names_everything_and_is_the_same_each_time() -> None:
    groups = {"one": {"x": (1.0, 0.1), "y": (-2.0, 0.0)}, "two": {"x": (3.0, 0.2)}}
    svg = bar_chart("A < B", groups, y_label="points")
    texts = {item.text for item in ElementTree.fromstring(svg).iter() if item.tag.endswith("text")}
    assert texts >= {"A < B", "one", "two", "x", "y", "points"}
    assert bar_chart("A < B", groups, y_label="points") == svg
