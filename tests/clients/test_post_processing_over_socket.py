"""Steps, reports and factors from end to end: a client, a socket, a server, and what the client does with the reply."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn
from typer.testing import CliRunner

from ghn_client import GHNClient
from ghn_client.cli.app import app
from ghn_client.errors import InvalidOptionError
from ghn_client.factors import factor_pairs
from ghn_client.finetune import defactorize_module, factorize_module
from ghn_client.options import LOW_RANK_METHODS

SHAPES = {"0.weight": (16, 3, 3, 3), "2.weight": (48, 16, 3, 3), "6.weight": (40, 48), "8.weight": (10, 40)}


def network() -> nn.Module:
    """The module that the ONNX file below is the structure of."""
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    convolutions = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 48, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*convolutions, *pool, nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 10))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Structure-only ONNX of ``network``: weights and biases are graph inputs."""
    names = [name for shape_name in SHAPES for name in (shape_name, shape_name.replace("weight", "bias"))]
    nodes = [
        helper.make_node("Conv", ["x", *names[0:2]], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", *names[2:4]], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("GlobalAveragePool", ["d"], ["e"]),
        helper.make_node("Flatten", ["e"], ["f"]),
        helper.make_node("Gemm", ["f", *names[4:6]], ["g"], transB=1),
        helper.make_node("Relu", ["g"], ["h"]),
        helper.make_node("Gemm", ["h", *names[6:8]], ["y"], transB=1),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 12, 12])]
    for name, shape in SHAPES.items():
        inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        inputs.append(helper.make_tensor_value_info(name.replace("weight", "bias"), TensorProto.FLOAT, shape[:1]))
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 10])]
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    built = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = tmp_path_factory.mktemp("model") / "network.onnx"
    onnx.save(onnx.shape_inference.infer_shapes(built), path)
    return path


@pytest.fixture(scope="module")
def client(checkpoint: Path) -> Iterator[GHNClient]:
    with GHNClient.embedded(checkpoint) as connected:
        yield connected


def test_steps_change_weights_and_are_recorded_in_the_file(client: GHNClient, model: Path) -> None:
    plain = client.predict(model)
    noisy = client.predict(model, steps=[("noise", {"beta": 0.5, "scale": "relative"}), "orthogonal:method=polar"])
    assert not torch.equal(plain["2.weight"], noisy["2.weight"])
    assert torch.equal(plain["8.weight"], noisy["8.weight"])
    assert [step["name"] for step in noisy.metadata.steps] == ["noise", "orthogonal"]
    assert noisy.metadata.steps[0]["options"]["beta"] == 0.5


def test_the_same_seed_gives_the_same_bytes_with_steps(client: GHNClient, model: Path) -> None:
    first, again = (client.predict(model, seed=5, steps=["auto"]) for _ in range(2))
    assert first.buffer == again.buffer


def test_the_report_comes_with_the_prediction(client: GHNClient, model: Path) -> None:
    assert client.predict(model).report is None
    report = client.predict(model, steps=["auto"], report=True).report
    assert report["summary"]["after"]["trouble"] <= report["summary"]["before"]["trouble"]
    assert report["prediction"]["seed"] == 0


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"steps": ["nois"]}, "steps[0].name"),
        ({"steps": ["auto", "noise:beta=nan"]}, "steps[1].options.beta"),
        ({"steps": ["noise:betta=1"]}, "steps[0].options.betta"),
        ({"low_rank": {"rank": 0}}, "low_rank.rank"),
        ({"low_rank": {"rank": 1000}}, "low_rank.rank"),
        ({"low_rank": {"fraction": float("nan")}}, "low_rank.fraction"),
        ({"low_rank": {"energy": 1.5}}, "low_rank.energy"),
        ({"low_rank": {"function_error": 1.0}}, "low_rank.function_error"),
        ({"low_rank": {"parameter_budget": 10}}, "low_rank.parameter_budget"),
    ],
    ids=str,
)
def test_impossible_options_are_refused_with_the_field_named(
    client: GHNClient, model: Path, options: dict, field: str
) -> None:
    with pytest.raises(InvalidOptionError) as error:
        client.predict(model, **options)
    assert error.value.field == field


@pytest.mark.parametrize("method", LOW_RANK_METHODS)
def test_factors_load_into_a_factored_module_and_equal_the_filled_onnx(
    client: GHNClient, model: Path, method: str, tmp_path: Path
) -> None:
    prediction = client.predict(model, low_rank={"fraction": 0.3, "method": method})
    assert set(factor_pairs(prediction)) == {"0.weight", "2.weight", "6.weight"}
    module = factorize_module(network(), prediction).eval()
    prediction.to_onnx(tmp_path / "factored.onnx")
    inputs = np.random.default_rng(0).standard_normal((1, 3, 12, 12)).astype(np.float32)
    session = onnxruntime.InferenceSession(tmp_path / "factored.onnx", providers=["CPUExecutionProvider"])
    (by_onnx,) = session.run(None, {"x": inputs})
    by_module = module(torch.from_numpy(inputs))
    dense = defactorize_module(module)(torch.from_numpy(inputs))
    np.testing.assert_allclose(by_onnx, by_module.detach().numpy(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(by_module, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("rule", "method"), [("fraction", "scaled"), ("energy", "scaled"), ("function_error", "function")]
)
def test_the_method_is_what_trains_best_unless_the_function_is_asked_for(
    client: GHNClient, model: Path, rule: str, method: str
) -> None:
    layers = client.analyze(model, low_rank={rule: 0.5}).low_rank
    assert method in {layer.method for layer in layers} <= {method, "spectral"}  # spectral where a norm follows


def test_the_file_says_enough_to_use_its_factors_alone(client: GHNClient, model: Path) -> None:
    low_rank = client.predict(model, low_rank={"function_error": 0.5}).metadata.low_rank
    (entry,) = [layer for layer in low_rank["layers"] if layer["parameter"] == "2.weight"]
    assert entry["factors"] == ["2.weight.factor_in", "2.weight.factor_out"]
    assert entry["activation"] == "relu"
    assert 0 < entry["function_error"] <= 0.5 + 1e-6


@pytest.mark.parametrize("low_rank", [{"fraction": 0.25}, {"parameter_budget": 3000, "method": "scaled"}], ids=str)
def test_an_analysis_tells_what_a_prediction_with_factors_holds(client: GHNClient, model: Path, low_rank: dict) -> None:
    analysis, prediction = client.analyze(model, low_rank=low_rank), client.predict(model, low_rank=low_rank)
    told = {layer.parameter: layer for layer in analysis.low_rank}
    for entry in prediction.metadata.low_rank["layers"]:
        layer = told.pop(entry["parameter"])
        assert (layer.chosen.rank, layer.method, layer.note) == (entry["rank"], entry["method"], entry["note"])
        assert (layer.dense.parameters, layer.chosen.parameters) == (entry["parameters"], entry["factored_parameters"])
        assert layer.chosen.function_error == pytest.approx(entry["function_error"])
        errors = [cost.function_error for cost in layer.curve]
        assert errors == sorted(errors, reverse=True)
    assert not told
    assert client.analyze(model).low_rank == ()
    with pytest.raises(InvalidOptionError) as error:
        client.analyze(model, low_rank={"parameter_budget": 10})
    assert error.value.field == "low_rank.parameter_budget"


def test_the_command_line_tells_what_ranks_cost_and_save(model: Path, checkpoint: Path) -> None:
    arguments = ["analyze", str(model), "--checkpoint", str(checkpoint), "--low-rank", "fraction=0.25"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "error at other ranks" in result.stdout
    assert "a: " in result.stdout
    document = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert {layer["parameter"] for layer in document["low_rank"]} >= {"0.weight", "2.weight"}


def test_the_command_line_writes_reports_and_factors(model: Path, checkpoint: Path, tmp_path: Path) -> None:
    for name in ("report.json", "report.html"):
        arguments = ["predict", str(model), "--checkpoint", str(checkpoint), "-o", str(tmp_path / "w.safetensors")]
        arguments += [
            "--step",
            "noise:beta=3e-5",
            "--step",
            "orthogonal:method=polar",
            "--report",
            str(tmp_path / name),
        ]
        arguments += ["--low-rank", "fraction=0.25,method=spectral"]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert [step["name"] for step in report["steps"]] == ["noise", "orthogonal"]
    assert report["low_rank"]["method"] == "spectral"
    assert "</html>" in (tmp_path / "report.html").read_text()


def test_a_report_of_another_format_is_refused_before_anything_is_predicted(model: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["predict", str(model), "--report", str(tmp_path / "report.pdf")])
    assert result.exit_code == 2
    assert not list(tmp_path.iterdir())


def test_a_merged_weight_gets_factors_for_each_of_its_uses(client: GHNClient, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Identity", ["1.weight"], ["2.weight"], name="Identity_7"),
        helper.make_node("Gemm", ["x", "1.weight"], ["a"], transB=1),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Gemm", ["b", "2.weight"], ["c"], transB=1),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("Gemm", ["d", "3.weight"], ["y"], transB=1),
    ]
    values = [("x", [1, 48], []), ("y", [1, 10], [])]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape, _ in values)
    weights = [
        TensorProto(name=name, dims=dims, data_type=1)
        for name, dims in (("1.weight", (48, 48)), ("3.weight", (10, 48)))
    ]
    graph = helper.make_graph(nodes, "g", [x], [y], weights)
    built = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="pytorch")
    prediction = client.predict(built.SerializeToString(), low_rank={"rank": 4})
    prediction.to_onnx(tmp_path / "factored.onnx")
    pairs = factor_pairs(dict(prediction))
    assert set(pairs) == {"1.weight", "2.weight"}
    inputs = np.random.default_rng(0).standard_normal((1, 48)).astype(np.float32)
    session = onnxruntime.InferenceSession(tmp_path / "factored.onnx", providers=["CPUExecutionProvider"])
    hidden = torch.from_numpy(inputs)
    for name in ("1.weight", "2.weight"):
        hidden = (hidden @ pairs[name].dense().T).relu()
    expected = hidden @ prediction["3.weight"].T
    np.testing.assert_allclose(session.run(None, {"x": inputs})[0], expected.numpy(), rtol=1e-4, atol=1e-5)


def test_weights_that_nodes_produce_get_factors(client: GHNClient, tmp_path: Path) -> None:
    path = Path(onnx.__file__).parent / "backend/test/data/light/light_squeezenet.onnx"
    prediction = client.predict(path, low_rank={"fraction": 0.25})
    prediction.to_onnx(tmp_path / "factored.onnx")
    filled = onnx.load(tmp_path / "factored.onnx")
    onnx.checker.check_model(filled, full_check=True)
    names = {item.name for item in filled.graph.initializer}
    factored = set(factor_pairs(dict(prediction)))
    assert factored
    assert all(name not in names and name + ".factor_in" in names for name in factored)
    assert not factored & {output for node in filled.graph.node for output in node.output}
