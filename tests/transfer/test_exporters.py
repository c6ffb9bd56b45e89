"""Files of torch's own exporters as sources and targets, evaluated by ONNX Runtime."""

import io
import warnings

import onnx
import pytest
import torch
from onnx import numpy_helper

from ghn_client.outputs import largest_relative_difference
from ghn_service.transfer.source import Source
from ghn_service.transfer.transfer import transfer_weights
from tests.transfer.pairs import Residual, randomise
from tests.transfer.test_zoo_pairs import PAIRS


def by_script(module, example):
    file = io.BytesIO()
    torch.onnx.export(module.eval(), (example,), file, dynamo=False)
    return onnx.load_from_string(file.getvalue())


def by_program(module, example):
    return torch.onnx.export(module.eval(), (example,), dynamo=True, verbose=False, optimize=True).model_proto


def by_plain_program(module, example):
    return torch.onnx.export(module.eval(), (example,), dynamo=True, verbose=False, optimize=False).model_proto


def check_files(given, wanted, size):
    """Transfers from one file to the other and compares their outputs."""
    runtime = pytest.importorskip("onnxruntime")
    tensors = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in given.graph.initializer}
    result = transfer_weights(Source("file", given.SerializeToString(), tensors), wanted.SerializeToString())
    assert result.plan.is_exact, result.plan.warnings
    found = {**result.tensors, **result.statistics}
    for item in wanted.graph.initializer:
        if item.name in found:
            item.CopyFrom(numpy_helper.from_array(found[item.name].numpy(), item.name))
    images = torch.randn(1, *size, generator=torch.Generator().manual_seed(5)).numpy()
    outputs = []
    for model in (given, wanted):
        session = runtime.InferenceSession(model.SerializeToString())
        outputs.append(torch.from_numpy(session.run(None, {model.graph.input[0].name: images})[0]))
    assert largest_relative_difference(*outputs) <= 1e-4


@pytest.mark.parametrize("export", [by_script, by_plain_program])
def test_files_of_another_exporter(export):
    example = torch.zeros(1, 3, 16, 16)
    source = randomise(Residual((8, 12), (1, 1)), example, seed=0)
    target = randomise(Residual((12, 20), (2, 1)), example, seed=1)  # equal tensors would be merged in the file
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_files(export(source, example), export(target, example), (3, 16, 16))


@pytest.mark.slow
@pytest.mark.parametrize("export", [by_plain_program, by_program])
@pytest.mark.parametrize(
    "name",
    [
        "squeeze and excitation",
        "group norm",
        "densenet, wider and deeper",
        "convnext, wider",
        "vit, more heads",
        "swin, wider",
    ],
)
def test_zoo_files_of_another_exporter(name, export):
    build_source, build_target, size = PAIRS[name]
    example = torch.zeros(1, *size)
    source, target = randomise(build_source(), example, seed=0), randomise(build_target(), example, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_files(export(source, example), export(target, example), size)
