"""A frozen network plus a small trainable one: sizes, start, composition, and one ONNX graph."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ghn_client.errors import InvalidOptionError, UnsupportedModuleError
from ghn_client.finetune.additive import AdditiveModule, additive
from ghn_client.finetune.handle import combine
from ghn_client.finetune.norm_only import norm_only
from ghn_client.finetune.patch.solver import patch
from ghn_client.finetune.side_network import SideNetwork
from ghn_client.onnx.torch_module import merge_onnx
from tests.finetune.networks import ResidualNetwork, mlp, train_a_little

INPUTS = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("at", ["logits", "features"])
@pytest.mark.parametrize("depth", [2, 3])
def test_starts_as_the_base_and_trains_only_the_side(at, depth):
    network = ResidualNetwork(8).eval()
    before = network(INPUTS)
    handle = additive(network, samples=40, changed=5, depth=depth, at=at, example_inputs=INPUTS)
    assert torch.equal(handle.module.eval()(INPUTS), before)
    base = {name: p.clone() for name, p in network.named_parameters()}
    train_a_little(handle.module, handle.parameters(), INPUTS)
    assert not torch.equal(handle.module(INPUTS), before)
    assert all(torch.equal(base[name], p) for name, p in network.named_parameters())
    assert torch.equal(handle.restore().eval()(INPUTS), network(INPUTS))


def test_width_comes_from_capacity_theory():
    two = additive(ResidualNetwork(8), samples=1000, changed=10).module.side
    three = additive(ResidualNetwork(8), samples=1000, changed=10, depth=3).module.side
    assert two.layers[0].out_features == 30
    assert [layer.out_features for layer in three.layers] == [9, 8 * 4, 4] or three.layers[-1].out_features == 4
    assert additive(ResidualNetwork(8), width=7).module.side.layers[0].out_features == 7


def test_the_random_start_is_seeded_without_seeding_any_device(monkeypatch):
    networks, state = [ResidualNetwork(8) for _ in range(2)], torch.get_rng_state()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda _: pytest.fail("the device was seeded"))
    first, second = (additive(network, width=3, seed=5).module.side for network in networks)
    assert torch.equal(first.layers[0].weight, second.layers[0].weight)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_head_of_a_stack_is_that_of_the_innermost_base():
    first = additive(ResidualNetwork(8), width=3).merge()
    second = additive(first, width=3).module
    assert second.head == "base.head"
    assert second(INPUTS).shape == (6, 4)


def test_disabled_gives_the_base():
    network = ResidualNetwork(8).eval()
    handle = additive(network, width=3)
    train_a_little(handle.module, handle.parameters(), INPUTS)
    with handle.disabled() as module:
        assert torch.equal(module(INPUTS), network(INPUTS))


def test_composes_with_norm_only():
    network = ResidualNetwork(8).eval()
    before = network(INPUTS)
    norm = norm_only(network, head=False, statistics="freeze")
    side = additive(norm.module, width=3)
    both = combine(norm, side)
    train_a_little(both.module, both.parameters(), INPUTS)
    trainable = {name for name, p in both.module.named_parameters() if p.requires_grad}
    assert any(name.startswith("base.norm") for name in trainable)
    assert any(name.startswith("side.") for name in trainable)
    assert "base.stem.weight" not in trainable
    assert torch.equal(both.restore().eval()(INPUTS), before)


def test_options_are_checked():
    network = ResidualNetwork(8)
    for options in (
        {"at": "middle", "width": 3},
        {"at": "logits", "width": 3},
        {"width": "auto"},
        {"width": "wide"},
        {"width": (3, 3)},
        {"width": 0},
        {"width": 3, "depth": 5},
    ):
        with pytest.raises(InvalidOptionError):
            additive(network, **options)


def test_networks_without_tensor_output_are_told_what_to_do():
    class Dictionary(nn.Module):
        def forward(self, inputs):
            return {"logits": inputs}

    with pytest.raises(UnsupportedModuleError, match="features"):
        AdditiveModule(Dictionary(), nn.Identity())(torch.zeros(1, 2))


def exported(network, inputs, path):
    onnx = pytest.importorskip("onnx")
    torch.onnx.export(network, (inputs,), str(path), dynamo=False, input_names=["x"], output_names=["y"])
    return onnx.load(str(path))


def run_onnx(model, inputs):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return torch.from_numpy(session.run(None, {"x": inputs.numpy()})[0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_a_patch_merges_into_one_onnx_graph(tmp_path, depth, precision):
    network = mlp(5, 8, 3).eval()
    inputs = torch.randn(12, 5)
    labels = network(inputs).argmax(1)
    result = patch(network, inputs[:1], (labels[:1] + 1) % 3, inputs[1:], depth=depth, precision=precision)
    model = merge_onnx(exported(network, inputs, tmp_path / "base.onnx"), result.side)
    torch.testing.assert_close(run_onnx(model, inputs), result.module(inputs).detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_trained_side_networks_merge_and_stack(tmp_path):
    network = mlp(5, 8, 3).eval()
    inputs = torch.randn(12, 5)
    sides = [SideNetwork(5, [4], 3) for _ in range(2)]
    for side in sides:
        nn.init.normal_(side.layers[-1].weight)
    model = exported(network, inputs, tmp_path / "base.onnx")
    once = merge_onnx(model, sides[0])
    with pytest.raises(InvalidOptionError):
        merge_onnx(once, sides[1])
    twice = merge_onnx(once, sides[1], prefix="second")
    expected = network(inputs) + sides[0](inputs) + sides[1](inputs)
    torch.testing.assert_close(run_onnx(twice, inputs), expected.detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_merging_at_features_and_unknown_tensors(tmp_path):
    network = mlp(5, 8, 3).eval()
    inputs = torch.randn(12, 5)
    model = exported(network, inputs, tmp_path / "base.onnx")
    side = SideNetwork(8, [4], 3)
    nn.init.normal_(side.layers[-1].weight)
    features = model.graph.node[-1].input[0]
    merged = merge_onnx(model, side, reads=features)
    expected = AdditiveModule(network, side, head="2")(inputs)
    torch.testing.assert_close(run_onnx(merged, inputs), expected.detach(), atol=1e-5, rtol=1e-4)
    with pytest.raises(InvalidOptionError):
        merge_onnx(model, side, reads="nothing")
