"""Plans count what the strategies really train, and say what they cannot do."""

from __future__ import annotations

import json

import pytest
import torch

from ghn_client.errors import InvalidArchitectureError, InvalidOptionError
from ghn_client.finetune.delta import save_delta
from ghn_client.finetune.planner import facts_of_module, plan
from ghn_client.finetune.strategies import prepare
from ghn_client.onnx.facts import facts_of_onnx
from tests.finetune.networks import ResidualNetwork, mlp, small_cnn


def rows_of(result):
    return {row.strategy: row for row in result.rows}


@pytest.mark.parametrize(
    ("strategy", "options"),
    [("all", {}), ("norm_only", {}), ("head_only", {}), ("bias_only", {}),
     ("low_rank_update", {"rank": 4}), ("additive", {"samples": 500, "changed": 7})],
)  # fmt: skip
def test_counts_agree_with_the_strategies(strategy, options):
    rows = rows_of(plan(ResidualNetwork(8), samples=500, changed=7, rank=4))
    handle = prepare(ResidualNetwork(8), strategy, **options)
    name = "additive (depth 2)" if strategy == "additive" else strategy
    assert rows[name].trainable == handle.num_trainable


def test_delta_size_is_about_right(tmp_path):
    handle = prepare(ResidualNetwork(8), "norm_only", statistics="freeze")
    size = save_delta(handle, tmp_path / "delta")
    planned = rows_of(plan(ResidualNetwork(8), samples=10))["norm_only"].delta_bytes
    assert 0.3 * size < planned < 3 * size


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("network", [ResidualNetwork(8), small_cnn()], ids=["residual", "factored"])
def test_an_onnx_file_gives_the_same_facts_as_the_module(tmp_path, network):
    pytest.importorskip("onnx")
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        network.train(), (torch.zeros(2, 3, 8, 8),), str(path), dynamo=False, do_constant_folding=False,
        training=torch.onnx.TrainingMode.TRAINING,
    )  # fmt: skip
    of_file, of_module = facts_of_onnx(path), facts_of_module(network)
    for name in ("parameters", "norm_parameters", "norm_kinds", "head_inputs", "head_outputs", "matrices"):
        assert getattr(of_file, name) == getattr(of_module, name)


def test_what_cannot_be_done_is_said():
    rows = rows_of(plan(mlp(5, 8, 3), samples=100))
    assert "insert" in rows["norm_only"].cannot
    assert "factorize" in rows["low_rank"].cannot
    assert "generalise" in rows["patch"].cannot


def test_recommendations():
    assert plan(ResidualNetwork(8), samples=10_000, changed=5).recommended == "patch"
    assert plan(small_cnn(), samples=1000).recommended == "low_rank"
    assert plan(ResidualNetwork(8), samples=1000).recommended == "norm_only"
    assert plan(mlp(5, 8, 3), samples=1000).recommended == "low_rank_update"
    tight = plan(ResidualNetwork(8), samples=50_000, memory_bytes=20_000)
    assert tight.recommended == "norm_only"
    assert "needs" in rows_of(tight)["all"].cannot


def test_plans_are_readable_and_json():
    result = plan(ResidualNetwork(8), samples=1000, changed=10)
    assert json.loads(result.to_json())["changed"] == 10
    assert "recommended: patch" in str(result)
    assert "derived by us" in str(result)


@pytest.mark.parametrize("options", [{"changed": 11}, {"optimizer": "lion"}, {"rank": 0}, {"classes": 1}])
def test_bad_options_are_refused(options):
    with pytest.raises(InvalidOptionError):
        plan(ResidualNetwork(8), samples=10, **options)


def test_files_that_are_no_onnx_are_refused(tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"hello")
    with pytest.raises(InvalidArchitectureError):
        facts_of_onnx(tmp_path / "x.onnx")


def test_a_linear_head_is_sure_of_no_label_among_more_samples_than_it_has_inputs():
    assert rows_of(plan(mlp(5, 8, 3), samples=9))["head_only"].capacity == 9
    assert rows_of(plan(mlp(5, 8, 3), samples=10))["head_only"].capacity == 0
