"""What the reproductions of this part write, from results that are made up: tables, verdicts and plots."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest
import torch

from benchmarks import reproduce_diversity, reproduce_low_rank
from benchmarks.charts import bar_chart
from ghn_client.finetune.factored import FactoredLayer


def low_rank_cells(*, gain: float) -> list[dict]:
    """Two seeds of each way with and without BatchNorm; ``scaled`` is better than the others by ``gain`` without."""
    return [
        {
            "batchnorm": batchnorm,
            "size": size,
            "way": way,
            "seed": seed,
            "rate": 0.03,
            "accuracy": 0.1 + 0.3 * batchnorm + 0.001 * seed + (gain * (1 + 0.1 * seed)) * is_better,
            "parameters": 1000,
        }
        for batchnorm in (False, True)
        for size, way in [(0.0, "dense"), *((1.0, way) for way in reproduce_low_rank.WAYS)]
        for seed in (0, 1)
        for is_better in [way == "scaled" and not batchnorm]
    ]


@pytest.mark.parametrize(("gain", "word"), [(0.1, "helps"), (-0.05, "hurts"), (0.0, "no difference")])
def test_a_verdict_follows_the_paired_differences(gain: float, word: str) -> None:
    lines = [line for line in reproduce_low_rank.verdicts(low_rank_cells(gain=gain)) if "`scaled` against" in line]
    assert [word in line for line in lines] == [True, gain == 0.0]


def test_runs_that_did_not_learn_are_counted() -> None:
    _, _, dense, without, *_ = reproduce_low_rank.accuracy_table(low_rank_cells(gain=0.1))
    assert "2 at chance" in dense
    assert without.count("2 at chance") == len(reproduce_low_rank.WAYS) - 1
    assert "**20.6" in without


def test_the_networks_of_one_seed_start_from_the_same_dense_weights() -> None:
    networks = []
    for way in ("spectral", "function"):
        torch.manual_seed(3)
        dense = reproduce_low_rank.build_network(normalize=False)
        networks.append(reproduce_low_rank.factored_network(dense, size=0.25, way=way))
    first, second = ([m for m in n.modules() if isinstance(m, FactoredLayer)] for n in networks)
    assert len(first) == 5
    for spectral, function in zip(first, second, strict=True):
        torch.testing.assert_close(spectral.v.weight, function.v.weight)
        assert not torch.equal(spectral.u.weight, function.u.weight)


@pytest.mark.parametrize("way", ["scaled", reproduce_low_rank.OPTIMIZED_SCALED])
def test_ways_that_keep_the_norm_keep_it(way: str) -> None:
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    u, v = reproduce_low_rank.factors(weight, 3, way)
    torch.testing.assert_close((u @ v.T).norm(), weight.norm())


def test_rows_of_the_spectral_product_may_keep_their_length() -> None:
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    u, v = reproduce_low_rank.factors(weight, 3, reproduce_low_rank.ROWS)
    torch.testing.assert_close((u @ v.T).norm(dim=1), weight.norm(dim=1))


def diversity_cells() -> list[dict]:
    accuracies = {"He": 0.2, "GHN": 0.4, "auto, last third": 0.3}
    return [
        {
            "data": "clothing",
            "network": "vit_small",
            "start": start,
            "seed": seed,
            "rate": 0.01,
            "accuracy": mean * (1 + 0.05 * seed),
            "before": 0.1,
        }
        for start, mean in accuracies.items()
        for seed in (0, 1)
    ]


def test_the_best_start_is_bold_and_steps_that_hurt_are_called_so() -> None:
    _, _, he, ghn, auto = reproduce_diversity.accuracy_table(diversity_cells())
    assert "10.0 → **41.0 ± 1.0**, 0.01" in ghn
    assert "10.0 → 20.5 ± 0.5 (-20.5 ± 0.5), 0.01" in he
    assert list(reproduce_diversity.verdicts(diversity_cells())) == [
        "- He: hurts in 1 of 1.",
        "- auto, last third: hurts in 1 of 1.",
    ]
    assert "(-10." in auto


def test_steps_act_on_the_layers_of_their_scope() -> None:
    graph = reproduce_diversity.find_network("resnet8_wide").graph()
    last_third, all_layers = (
        reproduce_diversity.options_of(f"QR, {scope}", graph, 0).steps[-1].options["layer"]
        for scope in (reproduce_diversity.LAST_THIRD, reproduce_diversity.ALL)
    )
    assert (last_third, all_layers) == ("7", "1")


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
