"""``export_architecture``: exact names, no weights, the module untouched, and a model that computes the same."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import ghn_client.onnx.export
from ghn_client import export_architecture
from ghn_client.errors import ExportError, InvalidArchitectureError
from ghn_client.onnx.export import ModelSource, read_source
from ghn_client.onnx.translate import NotTranslatableError, translate
from ghn_service.graph.onnx.reader import read_onnx
from tests.clients.small_modules import EXAMPLES, IMAGE, Auxiliary, ConvNet, InPlace, Tied, WithConstants, randomized
from tests.golden_graphs import load_golden
from tests.parity.test_golden_graphs import assert_equals_reference
from tests.zoo_support import build_torchvision

GOLDEN = ("resnet18_cifar10", "mobilenet_v3_small", "squeezenet1_1", "vit_b_16", "convnext_tiny", "vgg11_bn")


def filled(module: nn.Module, exported: ModelSource) -> onnx.ModelProto:
    """The exported model with the module's own values as initializers."""
    model = onnx.load_model_from_string(exported.structure)
    values = {**dict(module.named_parameters()), **exported.values}
    for info in [info for info in model.graph.input if info.name in values]:
        model.graph.input.remove(info)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values[info.name].detach().numpy(), info.name))
    return model


def run_onnx(model: onnx.ModelProto, x: torch.Tensor) -> numpy.ndarray[Any, Any]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


def assert_computes_the_same(module: nn.Module, example: torch.Tensor) -> None:
    module = randomized(module).eval()
    x = torch.rand(example.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = module(x).numpy()
    assert numpy.allclose(run_onnx(filled(module, read_source(module, x)), x), expected, atol=1e-5)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_exported_model_computes_what_the_module_computes(name: str) -> None:
    build, example = EXAMPLES[name]
    assert_computes_the_same(build(), example)


@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (3, 2), (4, 1), (4, 3), ((2, 3), (1, 2))])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name_computes_the_same(padding: str, kernel: Any, dilation: Any) -> None:
    assert_computes_the_same(nn.Conv2d(3, 4, kernel, padding=padding, dilation=dilation), IMAGE)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_every_parameter_is_an_input_under_its_own_name(name: str, device: str, training: bool) -> None:
    build, example = EXAMPLES[name]
    with torch.device(device):
        module = build().train(training)
    model = onnx.load_model_from_string(export_architecture(module, example))
    declared = {item.key: json.loads(item.value) for item in model.metadata_props}
    assert sorted(declared["ghn.parameters"]) == sorted(name for name, _ in module.named_parameters())
    shapes = {info.name: [dim.dim_value for dim in info.type.tensor_type.shape.dim] for info in model.graph.input}
    for parameter_name, parameter in module.named_parameters():
        assert shapes[parameter_name] == list(parameter.shape)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_service_reads_exactly_the_parameters(name: str) -> None:
    build, example = EXAMPLES[name]
    module = build()
    graph = read_onnx(export_architecture(module, example))
    assert {spec.name for spec in graph.parameters()} == {name for name, _ in module.named_parameters()}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_model_passes_the_checker_and_strict_shape_inference(name: str) -> None:
    build, example = EXAMPLES[name]
    onnx.checker.check_model(export_architecture(build(), example), full_check=True)


def test_a_module_on_meta_gives_the_same_bytes() -> None:
    with torch.device("meta"):
        weightless = ConvNet()
    assert export_architecture(weightless, IMAGE) == export_architecture(ConvNet(), IMAGE)


def test_the_module_is_left_as_it_was() -> None:
    module = randomized(ConvNet()).train()
    module.bn2.eval()
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    modes = [part.training for part in module.modules()]
    fast_path, random_state = torch.backends.mha.get_fastpath_enabled(), torch.random.get_rng_state()
    export_architecture(module, IMAGE)
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    assert [part.training for part in module.modules()] == modes
    assert torch.backends.mha.get_fastpath_enabled() == fast_path
    assert torch.equal(torch.random.get_rng_state(), random_state)


def test_batch_normalisation_stays_in_both_modes() -> None:
    for training in (True, False):
        model = onnx.load_model_from_string(export_architecture(ConvNet().train(training), IMAGE))
        assert sum(node.op_type == "BatchNormalization" for node in model.graph.node) == 2


def test_a_batch_of_one_in_training_mode_is_no_problem() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 4), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2)).train()
    export_architecture(module, torch.zeros(1, 3, 4, 4))


def test_auxiliary_heads_are_part_of_the_network_in_training_mode_only() -> None:
    outputs = {}
    for training in (True, False):
        model = onnx.load_model_from_string(export_architecture(Auxiliary().train(training), torch.zeros(2, 6)))
        outputs[training] = len(model.graph.output)
    assert outputs == {True: 2, False: 1}


def test_buffers_are_told_apart_but_for_running_statistics() -> None:
    class Shifted(nn.Module):
        def __init__(self, shift: torch.Tensor) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3, affine=False)
            self.register_buffer("shift", shift.view(3, 1, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x) - self.get_buffer("shift")

    structures = []
    for shift, mean in ((torch.arange(3.0), 0.0), (torch.arange(3.0), 5.0), (torch.ones(3), 0.0)):
        module = Shifted(shift)
        module.norm.running_mean.fill_(mean)
        structures.append(export_architecture(module, IMAGE))
    assert structures[0] == structures[1] != structures[2]
    metadata = onnx.load_model_from_string(structures[2]).metadata_props
    contents = {item.key: json.loads(item.value) for item in metadata}["ghn.contents"]
    assert contents.pop("shift") == "all 1"
    assert sorted(contents.values()) == ["all 0", "all 1"]  # weight and bias of the norm


def test_tied_weights_have_their_first_name() -> None:
    model = onnx.load_model_from_string(export_architecture(Tied(), torch.zeros(2, 6)))
    assert {"first.weight", "first.bias", "second.bias"} < {info.name for info in model.graph.input}
    assert "second.weight" not in {info.name for info in model.graph.input}


def test_a_name_that_a_value_has_too_stays_with_the_parameter() -> None:
    exported = onnx.load_model_from_string(export_architecture(WithConstants(), IMAGE))
    parameters = {item.key: json.loads(item.value) for item in exported.metadata_props}["ghn.parameters"]
    written = {name for node in exported.graph.node for name in node.output}
    assert {"x", "add"} <= set(parameters)
    assert not written & set(parameters)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, image: torch.Tensor, scale: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        return {"logits": self.fc(image if scale is None else image * scale)}


@pytest.mark.parametrize(
    ("example", "num_inputs"),
    [
        (torch.zeros(1, 4), 1),
        ((torch.zeros(1, 4), torch.zeros(1, 4)), 2),
        ({"image": torch.zeros(1, 4)}, 1),
        ({"image": torch.zeros(1, 4), "scale": torch.zeros(1)}, 2),
    ],
)
def test_inputs_come_as_tensor_tuple_or_dict(example: Any, num_inputs: int) -> None:
    model = onnx.load_model_from_string(export_architecture(TwoInputs(), example))
    assert len(model.graph.input) == num_inputs + 2


def test_inputs_are_not_guessed() -> None:
    with pytest.raises(ExportError):
        export_architecture(ConvNet())


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("example_input_array", IMAGE),
        ("pretrained_cfg", {"input_size": (3, 16, 16)}),
        ("dummy_inputs", {"x": IMAGE}),
    ],
)
def test_inputs_that_the_module_declares_are_used(attribute: str, value: Any) -> None:
    module = ConvNet()
    setattr(module, attribute, value)
    assert {spec.name for spec in read_onnx(export_architecture(module)).parameters()} >= {"conv1.weight"}


def test_a_module_that_cannot_be_traced_is_an_export_error() -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("not today")

    with pytest.raises(ExportError, match="not today"):
        export_architecture(Broken(), IMAGE)


def test_wrong_inputs_are_an_export_error_and_leave_the_module_in_its_mode() -> None:
    module = ConvNet().train()
    with pytest.raises(ExportError):
        export_architecture(module, torch.zeros(2, 5, 16, 16))
    assert all(part.training for part in module.modules())


def warnings_of_export(caplog: pytest.LogCaptureFixture) -> list[str]:
    loud = [record for record in caplog.records if record.levelname == "WARNING"]
    return [record.getMessage() for record in loud if record.name == "ghn_client.onnx.export"]


@pytest.mark.parametrize("last_way", ["_by_decomposition", "_by_torchscript"])
def test_the_slower_ways_give_the_same_names_and_graph_and_say_so(
    last_way: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = read_onnx(export_architecture(ConvNet().eval(), IMAGE))
    assert not warnings_of_export(caplog)

    def refuse(*args: Any) -> Any:
        raise NotTranslatableError("asked to")

    for way in ("_by_translation", "_by_decomposition"):
        if way != last_way:
            monkeypatch.setattr(ghn_client.onnx.export, way, refuse)
    graph = read_onnx(export_architecture(ConvNet().eval(), IMAGE))
    assert sorted(node.op_type for node in graph.nodes) == sorted(node.op_type for node in expected.nodes)
    assert len(graph.edges) == len(expected.edges)
    assert {spec.name for spec in graph.parameters()} == {spec.name for spec in expected.parameters()}
    (warning,) = warnings_of_export(caplog)
    assert "asked to" in warning


def test_torchs_private_exporter_is_where_the_fast_way_expects_it() -> None:
    """Fails where torch moves what ``translate`` uses, which users would notice only by the slower way's warning."""
    program = torch.export.export(ConvNet().eval(), (IMAGE,), strict=False)
    assert {"Conv", "BatchNormalization"} <= {node.op_type for node in translate(program).graph}


def test_exports_of_several_threads_take_turns() -> None:
    expected = export_architecture(ConvNet(), IMAGE)
    modules = [ConvNet() for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(export_architecture, modules, [IMAGE] * 8)) == [expected] * 8


CHANGES = {
    "whole": lambda y: y.relu_().add_(1).mul_(2),
    "later_reader": lambda y: (y.add_(1), y * 2)[1] + y,
    "view_of_it_after": lambda y: y.mul_(2).reshape(-1, 3).sum(1),
    "another_name_for_it": lambda y: (y.view(y.shape).add_(1), y * 3)[1],
    "constant_through_a_view": lambda y: y + filled_constant(y),
    "part": lambda y: (y[:, 1:3].zero_(), y)[1] * 1.0,
    "base_through_a_view": lambda y: (y.reshape(-1).add_(5), y)[1] * 2,
    "returned_part": lambda y: (y[:, 1:3].zero_(), y)[1],
}


def filled_constant(like: torch.Tensor) -> torch.Tensor:
    constant = like.new_zeros(2, 6)
    constant[:, 2:4] = 3.0
    constant[0] += 1.0
    return constant


@pytest.mark.parametrize("name", CHANGES)
def test_changes_in_place_are_written_as_what_they_compute(name: str) -> None:
    assert_computes_the_same(InPlace(CHANGES[name]), torch.zeros(2, 6))


TRANSPOSES = {
    "T": lambda y: y.T @ y,
    "mT": lambda y: y.mT @ y,
    "swapaxes": lambda y: y.swapaxes(0, 1) @ y,
    "T of three axes": lambda y: y.reshape(2, 3, 2).T * 2,
}


@pytest.mark.parametrize("name", TRANSPOSES)
def test_every_spelling_of_a_transpose_is_translated(name: str, caplog: pytest.LogCaptureFixture) -> None:
    assert_computes_the_same(InPlace(TRANSPOSES[name]), torch.zeros(2, 6))
    assert not warnings_of_export(caplog)


def test_nothing_of_the_users_machine_is_in_the_bytes() -> None:
    data = export_architecture(ConvNet(), IMAGE)
    assert b"small_modules" not in data
    assert b".py" not in data
    assert b"ConvNet" not in data


@pytest.mark.parametrize("name", GOLDEN)
def test_graphs_of_known_networks_equal_the_reference(name: str) -> None:
    record = load_golden(name)
    with torch.device("meta"):
        module, example = build_torchvision(name)
    assert_equals_reference(read_onnx(export_architecture(module.eval(), example)), record)


class DataDependent(nn.Module):
    """Its path depends on values, so that only the older exporter reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        return y * 2 if y.sum() > 0 else y


def test_what_torch_prints_about_a_failed_way_is_not_the_users_concern(capsys: pytest.CaptureFixture[str]) -> None:
    assert export_architecture(DataDependent(), torch.zeros(1, 4))
    assert "def forward" not in capsys.readouterr().err


@pytest.mark.parametrize("given", [DataDependent, 3, None, [DataDependent()]])
def test_what_is_no_network_is_refused_with_words(given: Any) -> None:
    with pytest.raises(InvalidArchitectureError) as caught:
        read_source(given)
    assert caught.value.field == "architecture"
