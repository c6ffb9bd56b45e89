"""Disabled channels are counted, and removed where the network provably does not need them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ghn_client.errors import InvalidOptionError, UnsupportedModuleError
from ghn_client.finetune.gamma import gamma_report, zeroed_scales
from ghn_client.finetune.norm_only import norm_only
from ghn_client.finetune.pruning import prune_disabled_channels
from tests.finetune.networks import ResidualNetwork, mlp, randomize_statistics
from tests.finetune.public_libraries import public_library

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def disable(network, share=0.4, *, value=0.0, seed=0):
    """Sets a share of all scales to ``value``, with shifts below zero for half of them."""
    generator = torch.Generator().manual_seed(seed)
    for layer in network.modules():
        if isinstance(layer, nn.modules.batchnorm._NormBase) and layer.affine:
            off = torch.rand(layer.num_features, generator=generator) < share
            layer.weight.data[off] = value
            layer.bias.data.normal_(0.0, 0.5, generator=generator)
    return network.eval()


def chain(padding=1):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 10, 3, padding=padding, bias=False), nn.BatchNorm2d(10), nn.ReLU(),
        nn.Conv2d(10, 12, 3, padding=padding), nn.BatchNorm2d(12), nn.SiLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(12 * (16 if padding else 4), 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 4),
    )  # fmt: skip
    randomize_statistics(network)
    return network


def check_same_function(network, pruned, inputs=IMAGES):
    with torch.no_grad(), zeroed_scales(network):
        torch.testing.assert_close(pruned.module(inputs), network(inputs), atol=1e-5, rtol=1e-4)


def test_report_counts_scales_near_zero():
    network = ResidualNetwork(8)
    network.norm.weight.data[:2] = 1e-3
    report = gamma_report(network, evaluate=lambda module: float(module.norm.weight.data.eq(0).sum()))
    assert report.layers[0].disabled == 2
    assert report.share == pytest.approx(2 / 40)
    assert (report.score, report.score_zeroed) == (0.0, 2.0)
    assert network.norm.weight.data[0] == pytest.approx(1e-3)
    assert all(sum(layer.histogram) == layer.channels for layer in report.layers)
    assert "5.0%" in str(report)


def test_report_refuses_networks_without_scales_and_bad_thresholds():
    with pytest.raises(UnsupportedModuleError):
        gamma_report(mlp(3, 3))
    with pytest.raises(InvalidOptionError):
        gamma_report(ResidualNetwork(8), threshold=-1.0)


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("value", [0.0, 1e-3])
def test_a_chain_loses_its_disabled_channels_and_keeps_its_function(padding, value):
    network = disable(chain(padding), value=value)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    pruned = prune_disabled_channels(network, IMAGES)
    check_same_function(network, pruned)
    assert pruned.report.parameters_after < 0.8 * pruned.report.parameters_before
    assert sum(pruned.report.removed.values()) + sum(count for count, _ in pruned.report.kept.values()) == (
        pruned.report.disabled
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_without_padding_every_disabled_channel_goes():
    network = disable(chain(padding=0))
    report = prune_disabled_channels(network, IMAGES).report
    assert sum(report.removed.values()) == report.disabled
    assert not report.kept


def test_a_constant_that_meets_zero_padding_stays_and_the_report_says_so():
    network = chain(padding=1).eval()
    network[1].weight.data[:2] = 0.0
    network[1].bias.data[:2] = torch.tensor([1.0, -1.0])
    pruned = prune_disabled_channels(network, IMAGES)
    assert pruned.report.removed == {"1": 1}
    assert pruned.report.kept["1"][0] == 1
    assert "padding" in pruned.report.kept["1"][1]
    check_same_function(network, pruned)


def test_residual_channels_go_only_when_all_branches_are_off():
    network = ResidualNetwork(8).eval()
    network.blocks[0].bn2.weight.data[:4] = 0.0
    network.blocks[0].bn2.bias.data[:4] = 0.0
    pruned = prune_disabled_channels(network, IMAGES)
    assert not pruned.report.removed
    assert pruned.report.kept["blocks.0.bn2"][0] == 4
    for layer in (network.norm, network.blocks[0].bn2, network.blocks[1].bn2):
        layer.weight.data[:4] = 0.0
        layer.bias.data[:4] = -0.1
    pruned = prune_disabled_channels(network, IMAGES)
    assert pruned.report.removed["norm"] == 4
    assert pruned.module.head.in_features == 4
    check_same_function(network, pruned)


def test_inner_channels_of_residual_blocks_go():
    network = ResidualNetwork(8).eval()
    network.blocks[0].bn1.weight.data[:3] = 0.0
    network.blocks[0].bn1.bias.data[:3] = -1.0
    pruned = prune_disabled_channels(network, IMAGES)
    assert pruned.module.blocks[0].conv1.out_channels == 5
    assert pruned.module.blocks[0].conv2.in_channels == 5
    check_same_function(network, pruned)


class Mixed(nn.Module):
    """Depthwise convolution, squeeze and excitation, concatenation, and a grouped convolution."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm1 = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.side, self.norm3 = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)
        self.merge, self.norm4 = nn.Conv2d(14, 8, 1), nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)
        self.head = nn.Linear(8, 3)
        randomize_statistics(self)

    def forward(self, images):
        x = torch.relu(self.norm1(self.first(images)))
        x = torch.relu(self.norm2(self.depthwise(x)))
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(nn.functional.adaptive_avg_pool2d(x, 1)))))
        y = torch.relu(self.norm3(self.side(images)))
        z = torch.relu(self.norm4(self.merge(torch.cat([x * gate, y], 1))))
        return self.head(self.grouped(z).mean((2, 3)))


def test_depthwise_concatenation_and_gates_are_followed_and_groups_block():
    network = disable(Mixed(), share=0.5)
    for layer in (network.norm1, network.norm2):
        layer.weight.data[:3] = 0.0
        layer.bias.data[:3] = -1.0
    pruned = prune_disabled_channels(network, IMAGES)
    check_same_function(network, pruned)
    assert pruned.report.removed["norm3"] > 0
    assert pruned.module.depthwise.groups < 8
    assert "norm4" not in pruned.report.removed
    assert "grouped" in pruned.report.kept["norm4"][1]


def test_one_channel_always_stays():
    network = chain(padding=0).eval()
    network[1].weight.data.zero_()
    pruned = prune_disabled_channels(network, IMAGES)
    assert pruned.module[0].out_channels == 1
    check_same_function(network, pruned)


def test_layer_norm_blocks():
    network = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 2)).eval()
    network[1].weight.data[:2] = 0.0
    report = prune_disabled_channels(network, torch.randn(3, 5)).report
    assert not report.removed
    assert report.kept["1"][0] == 2


def test_networks_that_cannot_be_followed_are_refused():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, images):
            return self.norm(images) if images.sum() > 0 else images

    with pytest.raises(UnsupportedModuleError):
        prune_disabled_channels(Branching(), IMAGES)
    handle = norm_only(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 2)), missing="insert")
    with pytest.raises(UnsupportedModuleError, match="merge"):
        prune_disabled_channels(handle.module, IMAGES)


def test_forward_code_with_written_out_widths_is_left_alone():
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(256, 2)

        def forward(self, images):
            return self.head(torch.relu(self.norm(self.conv(images))).view(-1, 256))

    network = disable(Written(), share=0.9)
    pruned = prune_disabled_channels(network, IMAGES)
    assert not pruned.report.removed


def test_a_layer_that_is_used_twice_is_left_alone():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.conv = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

        def forward(self, images):
            return self.conv(self.conv(torch.relu(self.norm(self.first(images)))))

    network = disable(Twice(), share=0.9)
    assert not prune_disabled_channels(network, IMAGES).report.removed


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121", "shufflenet_v2_x0_5"])
def test_networks_of_torchvision(name):
    torchvision = public_library("torchvision")
    torch.manual_seed(0)
    network = disable(torchvision.models.get_model(name, num_classes=10), share=0.3)
    images = torch.randn(2, 3, 64, 64)
    pruned = prune_disabled_channels(network, images)
    check_same_function(network, pruned, images)
    if name in ("resnet18", "mobilenet_v2"):
        assert pruned.report.parameters_after < pruned.report.parameters_before


def test_the_pruned_network_exports_to_a_smaller_file(tmp_path):
    pytest.importorskip("onnx")
    network = disable(chain())
    sizes = []
    for index, module in enumerate((network, prune_disabled_channels(network, IMAGES).module)):
        path = tmp_path / f"{index}.onnx"
        torch.onnx.export(module, (IMAGES,), str(path), dynamo=False)
        sizes.append(path.stat().st_size)
    assert sizes[1] < 0.8 * sizes[0]
