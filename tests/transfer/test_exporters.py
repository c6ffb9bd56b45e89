"""Files of torch's own exporters as sources and targets, evaluated by ONNX Runtime."""

import io
import warnings

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from ghn_client.outputs import largest_relative_difference
from ghn_service.graph.onnx.reader import read_onnx
from ghn_service.transfer.source import Source
from ghn_service.transfer.transfer import plan_transfer, transfer_weights
from tests.transfer.pairs import Residual, make_source, randomise
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


class Block(nn.Module):
    def __init__(self, width, *, normalize):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.GroupNorm(4, width) if normalize else nn.Identity()
        self.pointwise = nn.Conv2d(width, width, 1)
        self.gamma = nn.Parameter(torch.full((width, 1, 1), 0.1))
        nn.init.zeros_(self.pointwise.bias)

    def forward(self, images):
        return images + self.gamma * self.pointwise(torch.relu(self.norm(self.depthwise(images))))


def scaled(width, depth, *, normalize):
    """Blocks whose norms and layer scales begin alike, and biases that begin at zero."""
    head = nn.Linear(width, 10)
    nn.init.zeros_(head.bias)
    blocks = [Block(width, normalize=normalize) for _ in range(depth)]
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


@pytest.mark.parametrize("size", [(16, 3), (32, 5)], ids=["same", "wider and deeper"])
@pytest.mark.parametrize(
    ("export", "is_file"),
    [(by_script, False), (by_script, True), (by_plain_program, False), (by_plain_program, True), (by_program, True)],
)
def test_equal_tensors_that_an_exporter_merged_get_their_own_values(export, is_file, size):
    example = torch.zeros(1, 3, 16, 16)
    normalize = export is not by_script  # which leaves no trace of which layer's norm it merged
    trained = randomise(scaled(16, 3, normalize=normalize), example, seed=0)
    target = scaled(*size, normalize=normalize).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source, file = make_source(trained, example), export(target, example).SerializeToString()
        if is_file:
            model = export(trained, example)
            tensors = {item.name: torch.from_numpy(numpy_helper.to_array(item)) for item in model.graph.initializer}
            source = Source("file", model.SerializeToString(), tensors)
    specs = tuple(read_onnx(file).parameters())
    plan = plan_transfer(source, file, parameters=specs)
    assert plan.is_exact, plan.warnings
    result = transfer_weights(source, file, plan)
    with torch.no_grad():
        for spec in specs:
            axes = spec.permutation or range(len(spec.shape))
            parameter = target.get_parameter(spec.torch_name or spec.name)
            parameter.copy_(result.tensors[spec.name].permute(*axes).reshape(parameter.shape))
        images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))
        assert largest_relative_difference(trained(images), target(images)) <= 1e-4


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
