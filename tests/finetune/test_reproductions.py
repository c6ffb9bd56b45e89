"""The experiments of the documentation run, resume, and write their tables and plots."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

from benchmarks import reproduce_additive, reproduce_norm_only
from benchmarks.experiment import HELPS, NO_DIFFERENCE, fill_page, run_cells, run_seeds, verdict
from tests.shared_data import shared_path

ROOT = Path(__file__).resolve().parents[2]


def test_cells_are_measured_once(tmp_path):
    measured = []

    def measure(cell):
        measured.append(cell)
        return {"square": cell["x"] ** 2}

    run_cells(tmp_path / "cells.jsonl", [{"x": 1}, {"x": 2}], measure)
    with (tmp_path / "cells.jsonl").open("a") as file:
        file.write('{"cell": {"x"')  # a run that was killed while it wrote
    results = run_cells(tmp_path / "cells.jsonl", [{"x": 2}, {"x": 3}], measure)
    assert measured == [{"x": 1}, {"x": 2}, {"x": 3}]
    assert results == [{"x": 2, "square": 4}, {"x": 3, "square": 9}]


@pytest.mark.parametrize("near", [None, 0.1])
@pytest.mark.parametrize("best", [0.0003, 0.03, 3.0])
def test_a_learning_rate_is_never_at_the_edge_of_what_was_tried(tmp_path, best, near):
    tried = set()

    def measure(cell):
        tried.add(cell["rate"])
        return {"accuracy": -abs(math.log(cell["rate"] / best)) + 0.01 * (cell["seed"] % 7)}

    cells = run_seeds(tmp_path / "cells.jsonl", {"x": 1}, measure, seeds=2, near=near)
    assert [(cell["rate"], cell["seed"]) for cell in cells] == [(best, 0), (best, 1)]
    assert min(tried) < best < max(tried)


@pytest.mark.parametrize("seeds", [2, 3, 5, 20])
def test_noise_alone_is_seldom_called_a_difference(seeds):
    draws = torch.randn(4000, seeds, generator=torch.Generator().manual_seed(0)).tolist()
    assert sum(verdict(draw) != NO_DIFFERENCE for draw in draws) / len(draws) == pytest.approx(0.05, abs=0.02)
    assert verdict([1.0 + 0.01 * value for value in draws[0]]) == HELPS


def square(cell):
    return {"square": cell["x"] ** 2}


def test_several_workers_measure_the_same_and_in_the_given_order(tmp_path):
    cells = [{"x": x} for x in (3, 1, 2, 1)]
    alone = run_cells(tmp_path / "one.jsonl", cells, square)
    assert run_cells(tmp_path / "two.jsonl", cells, square, workers=2) == alone
    assert len((tmp_path / "two.jsonl").read_text().splitlines()) == 3


def test_cells_of_predicted_starts_depend_on_the_hypernetwork(tmp_path):
    starts = []
    for content in (b"one", b"two"):
        checkpoint = tmp_path / "ghn.safetensors"
        checkpoint.write_bytes(content)
        starts.append(reproduce_norm_only.predicted_starts(checkpoint))
    assert starts[0] != starts[1]


def test_everything_but_norm_layers_is_tuned_by_their_control():
    network = reproduce_norm_only.build(reproduce_norm_only.CONTROLLED, 0)
    everything = sum(value.numel() for value in network.parameters())
    tuned = reproduce_norm_only.all_but_norm(network).num_trainable
    norms = reproduce_norm_only.prepare(network, "norm_only", head=False).num_trainable
    assert tuned + norms == everything


@pytest.mark.parametrize(
    ("module", "name", "extra"),
    [(reproduce_additive, "additive", []), (reproduce_norm_only, "norm_only", [])],
)
def test_quick_runs_write_tables_and_plots(tmp_path, module, name, extra):
    data = shared_path("data/cifar10")
    page = tmp_path / "results.md"
    page.write_text((ROOT / "docs" / "results.md").read_text().replace("| ", "old"))
    module.main(
        ["--data", str(data), "--output", str(tmp_path), "--cells", str(tmp_path / "cells.jsonl"), "--quick", *extra]
    )
    assert page.read_text().count("| ") > 20
    assert "FAIL" not in page.read_text()
    assert ElementTree.parse(tmp_path / f"{name}_results.svg").getroot().tag.endswith("svg")


def test_filling_a_page_changes_its_blocks_alone(tmp_path):
    (tmp_path / "results.md").write_text("one\n<!-- a -->\nold\n<!-- end -->\ntwo\n<!-- b -->\nstays\n<!-- end -->\n")
    fill_page(tmp_path, {"a": ["new", r"\1"]}, {})
    text = (tmp_path / "results.md").read_text()
    assert text == "one\n<!-- a -->\nnew\n\\1\n<!-- end -->\ntwo\n<!-- b -->\nstays\n<!-- end -->\n"
    with pytest.raises(ValueError):
        fill_page(tmp_path, {"c": ["new"]}, {})
