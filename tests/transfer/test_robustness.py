import contextlib
import math

import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import nn

from ghn_client.onnx.export import export_architecture
from ghn_client.outputs import largest_relative_difference
from ghn_service.errors import GhnServiceError, SourceError
from ghn_service.transfer.axes import Dim, concatenation, product, reshaped, unify
from ghn_service.transfer.source import Source
from ghn_service.transfer.transfer import plan_transfer, transfer_weights
from tests.transfer.pairs import Residual, make_source, randomise, transfer_between

EXAMPLE = torch.zeros(1, 3, 16, 16)
FEW = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@FEW
@given(data=st.data())
def test_wider_deeper_networks_contain_narrower_shallower_ones(data):
    widths = data.draw(st.tuples(st.integers(4, 10), st.integers(4, 10)))
    depths = data.draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    more = [width + data.draw(st.integers(0, 12)) for width in widths]
    deeper = [depth + data.draw(st.integers(0, 2)) for depth in depths]
    source = randomise(Residual(widths, depths), EXAMPLE, seed=1)
    target = randomise(Residual(tuple(more), tuple(deeper)), EXAMPLE, seed=2)
    result = transfer_between(source, target, EXAMPLE)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert largest_relative_difference(source(images), target(images)) <= 1e-4
    assert result.plan.is_exact


def test_a_chain_of_single_channels_is_deepened():
    def chain(depth):
        layers = [part for _ in range(depth) for part in (nn.Conv2d(1, 1, 3, padding=1), nn.ReLU())]
        return nn.Sequential(nn.Conv2d(3, 1, 3, padding=1), nn.ReLU(), *layers, nn.Flatten(), nn.Linear(256, 5))

    source, target = randomise(chain(1), EXAMPLE, seed=0), randomise(chain(3), EXAMPLE, seed=1)
    result = transfer_between(source, target, EXAMPLE)
    assert result.plan.is_exact
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert largest_relative_difference(source(images), target(images)) <= 1e-4


def test_what_is_not_understood_is_not_mapped():
    """An unknown operator between two layers: neither side's channels may change there."""

    def model(width):
        nodes = [
            helper.make_node("Conv", ["x", "a"], ["h"]),
            helper.make_node("Mystery", ["h"], ["g"], domain="unknown.example"),
            helper.make_node("Conv", ["g", "b"], ["y"]),
        ]
        values = [helper.make_tensor_value_info("g", TensorProto.FLOAT, (1, width, 8, 8))]
        weights = [
            helper.make_tensor(name, TensorProto.FLOAT, shape, [0.0] * (shape[0] * shape[1]))
            for name, shape in (("a", (width, 3, 1, 1)), ("b", (5, width, 1, 1)))
        ]
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 3, 8, 8))]
        outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 5, 8, 8))]
        graph = helper.make_graph(nodes, "g", inputs, outputs, weights, value_info=values)
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid("unknown.example", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()

    tensors = {"a": torch.randn(4, 3, 1, 1), "b": torch.randn(5, 4, 1, 1)}
    with pytest.raises(SourceError):
        plan_transfer(Source("narrow", model(4), tensors), model(6))
    same = transfer_weights(Source("same", model(4), tensors), model(4))
    assert same.plan.is_exact
    assert torch.equal(same.tensors["a"], tensors["a"])


def test_another_activation_is_not_called_exact():
    source, target = (
        nn.Sequential(nn.Conv2d(3, 8, 3), act, nn.Flatten(), nn.Linear(8 * 196, 5)) for act in (nn.ReLU(), nn.GELU())
    )
    plan = plan_transfer(make_source(source, EXAMPLE), export_architecture(target, EXAMPLE))
    assert not plan.is_exact
    assert set(plan.origins.values()) == {"exact"}


def with_window(*parts):
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), *parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def with_computed_weight(dilation):
    return nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=dilation, dilation=dilation))


WINDOWS = {
    "pads of the convolution": ([nn.ZeroPad2d(1), nn.Conv2d(8, 8, 3)], [nn.Conv2d(8, 8, 3, padding=1)], True),
    "a larger kernel": ([nn.Conv2d(8, 8, 3, 2, 1)], [nn.Conv2d(8, 8, 5, 2, 2)], True),
    "pads that are no zeros": ([nn.ConstantPad2d(1, 5.0), nn.Conv2d(8, 8, 3)], [nn.Conv2d(8, 8, 3, padding=1)], False),
    "a crop": ([nn.ZeroPad2d(-1), nn.Conv2d(8, 8, 3, padding=1)], [nn.Conv2d(8, 8, 3)], False),
    "fewer pads behind": ([nn.ZeroPad2d(1), nn.Conv2d(8, 8, 3)], [nn.ZeroPad2d((1, 0) * 2), nn.Conv2d(8, 8, 3)], False),
    "a larger kernel without pads behind": ([nn.Conv2d(8, 8, 3, 2, 1)], [nn.Conv2d(8, 8, 4, 2, 1)], False),
    "a transposed convolution": (
        [nn.ConvTranspose2d(8, 8, 4, 2, 1)], [nn.ConvTranspose2d(8, 8, 4, 2)], False
    ),
    "a computed weight": ([with_computed_weight(1)], [with_computed_weight(2)], False),
}  # fmt: skip


@pytest.mark.parametrize("size", [16, 20])
@pytest.mark.parametrize("name", WINDOWS)
def test_windows_that_meet_other_pixels_are_not_called_exact(name, size):
    source, target, is_exact = WINDOWS[name]
    structure = export_architecture(with_window(*target), torch.zeros(1, 3, size, size))
    plan = plan_transfer(make_source(with_window(*source), EXAMPLE), structure)
    assert plan.is_exact == is_exact


@pytest.mark.parametrize("opset", [10, 18])
@pytest.mark.parametrize(("value", "is_exact"), [(0.0, True), (5.0, False)])
def test_what_a_file_pads_with_is_read(value, is_exact, opset):
    def model(pads_with):
        pads = [0, 0, 1, 1, 0, 0, 1, 1]
        tensors = {"a": (4, 3, 3, 3), "b": (5, 4, 8, 8)}
        weights = [helper.make_tensor(key, TensorProto.FLOAT, shape, bytes(4 * math.prod(shape)), raw=True)
                   for key, shape in tensors.items()]  # fmt: skip
        if opset > 10:
            weights.append(helper.make_tensor("pads", TensorProto.INT64, (8,), pads))
            weights.append(helper.make_tensor("value", TensorProto.FLOAT, (), [pads_with]))
            pad = helper.make_node("Pad", ["x", "pads", "value"], ["h"])
        else:
            pad = helper.make_node("Pad", ["x"], ["h"], pads=pads, value=pads_with)
        nodes = [pad, helper.make_node("Conv", ["h", "a"], ["g"]), helper.make_node("Conv", ["g", "b"], ["y"])]
        inputs, outputs = (
            [helper.make_tensor_value_info(key, TensorProto.FLOAT, shape)]
            for key, shape in (("x", (1, 3, 8, 8)), ("y", (1, 5, 1, 1)))
        )
        graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)

    source = Source(
        "file", model(0.0).SerializeToString(), {"a": torch.randn(4, 3, 3, 3), "b": torch.randn(5, 4, 8, 8)}
    )
    assert plan_transfer(source, model(value).SerializeToString()).is_exact == is_exact


def test_another_modality_is_refused():
    source = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 11))
    tokens = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(SourceError):
        plan_transfer(make_source(source, tokens), export_architecture(Residual((8, 12), (1, 1)), EXAMPLE))


def test_quantised_and_misshapen_weights_are_refused():
    module = Residual((8, 12), (1, 1))
    structure = export_architecture(module, EXAMPLE)
    whole = {name: value for name, value in module.state_dict().items() if value.is_floating_point()}
    for name, value in (("head.weight", torch.zeros(10, 12, dtype=torch.int8)), ("head.weight", torch.zeros(3, 12))):
        with pytest.raises(SourceError):
            plan_transfer(Source("odd", structure, {**whole, name: value}), structure)
    with pytest.raises(SourceError):
        plan_transfer(Source("partial", structure, {"head.weight": whole["head.weight"]}), structure)


@pytest.mark.parametrize("width", [8, 12])
@pytest.mark.parametrize("epsilons", [(1e-5, 1e-3), (1e-3, 1e-5)], ids=str)
def test_another_epsilon_is_made_good_behind_small_variances(epsilons, width):
    def network(channels, epsilon):
        return nn.Sequential(
            nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels, eps=epsilon), nn.Flatten(), nn.Linear(196 * channels, 5)
        )

    source, target = (randomise(network(w, e), EXAMPLE, seed=0) for w, e in zip((8, width), epsilons, strict=True))
    with torch.no_grad():
        source[1].running_var[::2] = 3e-5
        source[1].weight[::2] *= 0.01
    result = transfer_between(source, target, EXAMPLE)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert largest_relative_difference(source(images), target(images)) <= 1e-4
    assert result.plan.is_exact


class Tokens(nn.Module):
    """A linear layer for each pixel."""

    def __init__(self, bias):
        super().__init__()
        self.mix = nn.Linear(8, 8, bias=bias)

    def forward(self, x):
        return self.mix(x.flatten(2).mT).mT[..., None]


@pytest.mark.parametrize("build", [Tokens, lambda bias: nn.Conv2d(8, 8, 3, bias=bias)], ids=["linear", "convolution"])
def test_a_new_bias_is_zero(build):
    source, target = with_window(build(False)), with_window(build(True))
    result = transfer_between(source, target, EXAMPLE)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert largest_relative_difference(source(images), target(images)) <= 1e-6
    assert result.plan.is_exact


@pytest.mark.parametrize("is_shared", [False, True])
def test_a_larger_epsilon_that_no_weight_makes_good_is_not_called_exact(is_shared):
    def network(epsilon):
        norms = [nn.BatchNorm2d(8, eps=epsilon, affine=is_shared) for _ in range(2)]
        if is_shared:
            norms[1].weight = norms[0].weight
        layers = nn.Conv2d(3, 8, 3), norms[0], nn.ReLU(), nn.Conv2d(8, 8, 3), norms[1]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(144 * 8, 5))

    source = network(1e-4)
    structure = export_architecture(source, EXAMPLE)
    constants = {tensor.name: torch.ones(8) for tensor in onnx.load_from_string(structure).graph.input}
    for epsilon, is_exact in ((1e-3, False), (1e-4, True), (1e-5, True)):
        trained = Source("trained", structure, {**constants, **source.state_dict()})
        assert plan_transfer(trained, export_architecture(network(epsilon), EXAMPLE)).is_exact == is_exact


@pytest.mark.parametrize("widths", [(10, 16), (6, 12)])
def test_weights_of_double_precision_are_mapped(widths):
    source, target = Residual((8, 12), (1, 1)).double(), Residual(widths, (1, 1))
    result = transfer_weights(make_source(source, EXAMPLE.double()), export_architecture(target, EXAMPLE))
    assert result.tensors["stem.0.weight"].shape == (widths[0], 3, 3, 3)


@FEW
@given(data=st.data())
def test_damaged_structures_raise_typed_errors_or_work(data):
    module = Residual((4, 6), (1, 1))
    structure = export_architecture(module, EXAMPLE)
    model = onnx.load_from_string(structure)
    for _ in range(data.draw(st.integers(1, 4))):
        node = model.graph.node[data.draw(st.integers(0, len(model.graph.node) - 1))]
        damage = data.draw(st.sampled_from(["operator", "attributes", "input", "integers"]))
        if damage == "operator":
            node.op_type = data.draw(st.sampled_from(["Reshape", "Split", "Gather", "MatMul", "Concat", "Pad", "Odd"]))
        elif damage == "attributes":
            del node.attribute[:]
        elif damage == "input" and node.input:
            del node.input[-1]
        else:
            for attribute in node.attribute:
                if attribute.ints:
                    attribute.ints[0] = data.draw(st.integers(-(2**62), 2**62))
    with contextlib.suppress(GhnServiceError):
        plan_transfer(make_source(module, EXAMPLE), model.SerializeToString())


def test_groups_split_and_meet_as_their_uses_demand():
    packed, heads = Dim(24), reshaped([Dim(24)], [3, 2, 4])
    assert unify(packed, product(heads))
    assert [leaf.size for leaf in packed.leaves()] == [3, 2, 4]
    assert [leaf.root() for leaf in packed.leaves()] == [dim.root() for dim in heads]
    joined, other = concatenation([Dim(4), Dim(6)]), Dim(10)
    assert unify(joined, other)
    assert [leaf.size for leaf in other.leaves()] == [4, 6]
    assert not unify(concatenation([Dim(5), Dim(5)]), product([Dim(5), Dim(2)]))  # two structures that do not agree
