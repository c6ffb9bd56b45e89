"""An ONNX file becomes a torch module: same function, same names, any batch, trainable."""

from __future__ import annotations

import copy
import io
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from ghn_architectures.architecture import Interface
from ghn_architectures.registry import ARCHITECTURES
from ghn_client.errors import UnsupportedModuleError
from ghn_client.finetune.additive import additive
from ghn_client.finetune.delta import load_delta, save_delta
from ghn_client.finetune.matrix_layers import norm_layers
from ghn_client.finetune.norm_only import norm_only
from ghn_client.finetune.strategies import prepare
from ghn_client.onnx.export import read_source
from ghn_client.onnx.torch_module import input_shape, module_from_onnx, to_onnx
from tests.clients.test_export import filled as with_own_values
from tests.finetune.networks import ResidualNetwork, randomize_statistics, train_a_little
from tests.zoo_support import import_torchvision


class Transformer(nn.Module):
    """Patches, a class token, attention with the batch in the second axis, and layers that are used twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.position = nn.Parameter(torch.randn(1, 5, 16))
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.mlp = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Dropout(0.3), nn.Linear(24, 16))
        self.head = nn.Linear(16, 4)

    def forward(self, images):
        count = images.shape[0]
        patches = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(count, -1, -1), patches], 1) + self.position
        for _ in range(2):
            mixed = self.norm(tokens).transpose(0, 1)
            q, k, v = self.qkv(mixed).chunk(3, -1)
            q, k, v = (part.reshape(5, count * 2, 8).transpose(0, 1) for part in (q, k, v))
            weights = torch.softmax(q @ k.transpose(1, 2) / 8**0.5, -1)
            merged = (weights @ v).transpose(0, 1).reshape(5 * count, 16)
            tokens = tokens + merged.view(5, count, 16).transpose(0, 1)
            tokens = tokens + self.mlp(self.norm(tokens))
        return self.head(tokens[:, 0])


class Mixture(nn.Module):
    """Grouped and uneven convolutions, squeeze and excitation, group norm, pools, splits and slices."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding="same", bias=False)
        self.norm = nn.GroupNorm(2, 8)
        self.depthwise = nn.Conv2d(8, 8, (3, 1), stride=2, padding=(1, 0), groups=8)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.scale = nn.Parameter(torch.rand(8, 1, 1))
        self.head = nn.Linear(8, 4)

    def forward(self, images):
        features = nn.functional.hardswish(self.norm(self.stem(images)))
        features = nn.functional.max_pool2d(nn.functional.pad(features, (0, 1, 0, 1)), 3, 1)
        features = self.depthwise(features)
        gate = nn.functional.hardsigmoid(self.excite(torch.relu(self.squeeze(features.mean((2, 3), keepdim=True)))))
        first, second = (features * gate * self.scale).chunk(2, 1)
        features = torch.cat([second.clamp(-1, 6), torch.roll(first, 1, 2)], 1)
        return self.head(torch.flatten(nn.functional.adaptive_avg_pool2d(features, 1), 1))


NETWORKS = {"residual": ResidualNetwork, "transformer": Transformer, "mixture": Mixture}


def filled(module, *, way="torchscript", example=None):
    """The module as an ONNX file with its weights, exported in the mode it is in."""
    module = copy.deepcopy(module)  # the older exporter runs it
    example = torch.randn(1, 3, 8, 8) if example is None else example
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if way == "dynamo":
            program = torch.onnx.export(module, (example,), dynamo=True, optimize=False, verbose=False)
            return program.model_proto
        mode = torch.onnx.TrainingMode.PRESERVE
        torch.onnx.export(module, (example,), file, dynamo=False, training=mode, do_constant_folding=False)
    return onnx.ModelProto.FromString(file.getvalue())


def converted(module, **options):
    """The module as a file and back; the running statistics that the older exporter moved go into the module."""
    model = filled(module, **options)
    result = module_from_onnx(model, torch.randn(1, *input_shape(model)[1:]))
    own = dict(module.named_buffers())
    for name, value in result.named_buffers():
        if name in own:
            own[name].copy_(value)
    return result


@pytest.fixture(scope="module")
def images():
    return torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_same_function_and_same_names_for_any_batch(name, training, images):
    module = NETWORKS[name]().train(training)
    result = converted(module)
    assert set(dict(result.named_parameters())) == set(dict(module.named_parameters()))
    with torch.no_grad():
        torch.testing.assert_close(result(images), module.eval()(images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_files_of_the_newer_exporter(name, images):
    module = NETWORKS[name]().eval()
    result = converted(module, way="dynamo")
    assert set(dict(result.named_parameters())) == set(dict(module.named_parameters()))
    with torch.no_grad():
        torch.testing.assert_close(result(images), module(images), atol=1e-5, rtol=1e-4)


def test_same_function_as_onnxruntime():
    example = torch.randn(1, 3, 8, 8)
    model = filled(ResidualNetwork().eval())
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (expected,) = session.run(None, {session.get_inputs()[0].name: example.numpy()})
    with torch.no_grad():
        result = module_from_onnx(model, example)(example)
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-5)


def test_gradients_and_running_statistics_are_those_of_the_module(images):
    module = ResidualNetwork()
    result = converted(module)
    for network in (module, result):
        network.train()(images).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in result.named_parameters()}
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(result.norm.running_mean, module.norm.running_mean)


def test_dropout_is_active_in_train_mode_only(images):
    result = converted(Transformer().train())
    assert any(isinstance(child, nn.Dropout) for child in result.modules())
    with torch.no_grad():
        assert torch.equal(result.eval()(images), result(images))
        assert not torch.equal(result.train()(images), result(images))


def test_stochastic_depth_draws_for_every_sample():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, inputs):
            kept = torch.empty(inputs.shape[0], 1, 1, 1).bernoulli_(0.5) / 0.5
            return self.head((inputs * kept).mean((2, 3)))

    result = converted(Network().train()).train()
    torch.manual_seed(0)
    outputs = result(torch.ones(64, 3, 8, 8))
    assert len(outputs.unique(dim=0)) == 2
    torch.testing.assert_close(
        result.eval()(torch.ones(2, 3, 8, 8)), result.head(torch.ones(2, 3)), atol=1e-6, rtol=1e-6
    )


def test_layers_are_torch_layers_at_their_paths():
    result = converted(ResidualNetwork().train())
    assert isinstance(result.get_submodule("blocks.0.conv1"), nn.Conv2d)
    assert isinstance(result.get_submodule("head"), nn.Linear)
    assert list(norm_layers(result)) == list(norm_layers(ResidualNetwork()))


@pytest.mark.parametrize("strategy", ["norm-only", "low-rank-update", "additive"])
def test_deltas_of_the_converted_module_fit_the_module(tmp_path, strategy, images):
    module = ResidualNetwork()
    options = {"width": 4} if strategy == "additive" else {}
    handle = prepare(converted(module), strategy, **options)
    train_a_little(handle.module, handle.parameters(), images)
    save_delta(handle, tmp_path / "delta.safetensors")
    tuned = load_delta(module, tmp_path / "delta.safetensors").merge().eval()
    with torch.no_grad():
        torch.testing.assert_close(tuned(images), handle.merge().eval()(images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("at", ["features", "logits", None])
def test_the_tuned_network_is_written_back_to_onnx(at, images):
    model = filled(ResidualNetwork().eval())
    network = module_from_onnx(model, images[:1])
    handle = norm_only(network) if at is None else additive(network, width=4, at=at, example_inputs=images[:1])
    train_a_little(handle.module, handle.parameters(), images)
    tuned = handle.merge().eval()
    session = onnxruntime.InferenceSession(to_onnx(tuned, network, model).SerializeToString())
    (result,) = session.run(None, {session.get_inputs()[0].name: images[:1].numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(result, tuned(images[:1]).numpy(), atol=1e-4)


def test_transposed_weights_become_linear_layers_and_go_back():
    weight = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("MatMul", ["x", "onnx::MatMul_7"], ["product"]),
            onnx.helper.make_node("Add", ["fc.bias", "product"], ["y"]),
        ],
        "transposed",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 6])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", 4])],
        [onnx.numpy_helper.from_array(weight, "onnx::MatMul_7"), onnx.numpy_helper.from_array(weight[0], "fc.bias")],
    )
    model = onnx.helper.make_model(graph)
    network = module_from_onnx(model, torch.randn(2, 6))
    assert isinstance(network.fc, nn.Linear)
    np.testing.assert_array_equal(network.fc.weight.detach().numpy(), weight.T)
    network.fc.weight.data += 1.0
    (first, _) = to_onnx(network, network, model).graph.initializer
    np.testing.assert_allclose(onnx.numpy_helper.to_array(first), weight + 1.0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_reference_networks_in_our_own_export(name):
    torch.manual_seed(0)
    module = ARCHITECTURES[name].build(Interface()).eval()
    images = torch.randn(3, 3, 32, 32)
    model = with_own_values(module, read_source(module, images[:1]))
    result = module_from_onnx(model, images[:1], parameters=dict(module.named_parameters()))
    assert set(dict(result.named_parameters())) == set(dict(module.named_parameters()))
    with torch.no_grad():
        expected = module(images)
        torch.testing.assert_close(result(images), expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-4)


def test_what_cannot_be_trained_is_refused():
    def model_of(*nodes, inputs=("x",), constants=()):
        infos = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 4]) for name in inputs]
        output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
        tensors = [onnx.numpy_helper.from_array(value, name) for name, value in constants]
        return onnx.helper.make_model(onnx.helper.make_graph(list(nodes), "g", infos, [output], tensors))

    node = onnx.helper.make_node
    impossible = [
        model_of(node("Det", ["x"], ["y"])),
        model_of(node("Relu", ["x"], ["y"], domain="com.example")),
        model_of(node("Add", ["x", "weight"], ["y"]), inputs=("x", "weight")),
        model_of(node("Add", ["x", "nowhere"], ["y"])),
        model_of(node("Shape", ["x"], ["y"])),
        model_of(node("ReduceSum", ["x"], ["y"], keepdims=1)),
    ]
    for model in impossible:
        with pytest.raises(UnsupportedModuleError):
            module_from_onnx(model, torch.randn(1, 4))


def test_a_fixed_batch_that_cannot_be_freed_is_refused():
    module = Transformer().eval()
    with pytest.raises(UnsupportedModuleError):
        module_from_onnx(filled(module, example=torch.randn(2, 3, 8, 8)), torch.randn(2, 3, 8, 8))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("way", ["torchscript", "dynamo"])
@pytest.mark.parametrize(
    "name",
    ["resnet18", "densenet121", "mobilenet_v3_small", "efficientnet_b0", "shufflenet_v2_x0_5", "squeezenet1_1",
     "regnet_y_400mf", "mnasnet0_5", "vgg11_bn", "convnext_tiny", "swin_t", "vit_b_16"],
)  # fmt: skip
def test_classifiers_of_torchvision(name, way):
    torch.manual_seed(0)
    size = (
        224 if name in ("vit_b_16", "vgg11_bn") else 64
    )  # the older exporter writes adaptive pools that divide evenly
    module = import_torchvision().models.get_model(name, weights=None, num_classes=10)
    randomize_statistics(module)
    example = torch.randn(1, 3, size, size)
    result = converted(module.train(way == "torchscript"), way=way, example=example)
    inputs = torch.randn(3, 3, size, size)
    assert set(dict(result.named_parameters())) == set(dict(module.named_parameters()))
    with torch.no_grad():
        expected = module.eval()(inputs)
        torch.testing.assert_close(result(inputs), expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-3)
