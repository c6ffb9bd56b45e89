"""What a reply is: one file, whose values are the memory of the prediction."""

from __future__ import annotations

import safetensors.torch
import torch

from ghn_service.graph.architecture import ParameterSpec
from ghn_service.graph.onnx.reader import read_onnx
from ghn_service.parameters import ParameterSet
from ghn_service.predictor import PredictionOptions
from ghn_service.server.models import LoadedModel
from ghn_service.server.reply import encode_result_header, encode_values
from tests.server.fake_predictor import SUMMARY, FakePredictor
from tests.server.small_models import TINY

GRAPH = read_onnx(TINY)
MODEL = LoadedModel("fake", SUMMARY, (), ("cpu",))
OPTIONS = PredictionOptions(seed=3)
RESULT = FakePredictor().run(GRAPH, options=OPTIONS, on_stage=lambda name: None)


def test_header_and_values_are_a_safetensors_file() -> None:
    file = encode_result_header(RESULT, OPTIONS, MODEL) + b"".join(encode_values(RESULT.parameters))
    found = safetensors.torch.load(file)
    assert set(found) == set(RESULT.parameters)
    assert all(torch.equal(found[name], tensor) for name, tensor in RESULT.parameters.items())


def test_values_are_views_of_their_tensors() -> None:
    memory = torch.arange(6.0)
    parameters = ParameterSet({"x": ParameterSpec("x", (2, 3))}, {"x": memory.view(2, 3)}, {"x": "predicted"})
    (view,) = encode_values(parameters)
    memory[5] = 77.0
    assert bytes(view) == memory.numpy().tobytes()


def test_a_tensor_that_is_not_contiguous_is_copied_in_its_order() -> None:
    matrix = torch.arange(6.0).view(2, 3).t()
    parameters = ParameterSet({"x": ParameterSpec("x", (3, 2))}, {"x": matrix}, {"x": "predicted"})
    assert b"".join(encode_values(parameters)) == matrix.contiguous().numpy().tobytes()
