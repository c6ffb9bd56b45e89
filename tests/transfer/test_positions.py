"""Positions for other sizes of images and longer sequences: grids are interpolated, sequences go on."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from ghn_client.onnx.export import export_architecture
from ghn_client.outputs import largest_relative_difference
from ghn_service.transfer.transfer import transfer_weights
from tests.transfer.pairs import make_source, randomise
from tests.transfer.test_zoo_pairs import of, swin, timm_vit, torchvision_vit
from tests.zoo_support import import_timm


def transfer_between_sizes(source, target, source_example, target_example):
    result = transfer_weights(make_source(source, source_example), export_architecture(target, target_example))
    target.load_state_dict({**result.tensors, **result.statistics}, strict=False)
    source.eval()
    target.eval()
    return result.plan


def image(size):
    return torch.zeros(1, 3, size, size)


class Patches(nn.Module):
    """Patches with a class token and a grid of positions."""

    def __init__(self, side):
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 1 + side * side, 8))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        return self.head(self.norm(x).mean(1))


class Window(nn.Module):
    """Attention in one window, with biases by relative position."""

    def __init__(self, side):
        super().__init__()
        places = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(1)
        distances = places[:, :, None] - places[:, None, :] + side - 1
        self.register_buffer("index", distances[0] * (2 * side - 1) + distances[1])
        self.table = nn.Parameter(torch.randn((2 * side - 1) ** 2, 1))
        self.queries, self.values, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x):
        queries = self.queries(x)
        logits = queries @ queries.transpose(1, 2) + self.table[self.index.flatten()].view(self.index.shape)
        return self.head((logits.softmax(-1) @ self.values(x)).mean(1))


class Sentence(nn.Module):
    """Tokens at learned positions, of which the first are used."""

    def __init__(self, length):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, 6), nn.Embedding(length, 6)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.norm(self.tokens(x) + self.positions(torch.arange(x.shape[1]))).mean(1))


def interpolated(table, side):
    """A table (N, C) of a square grid as one of ``side`` x ``side``."""
    old = round(table.shape[0] ** 0.5)
    grid = table.T.reshape(1, -1, old, old)
    return functional.interpolate(grid, (side, side), mode="bicubic", antialias=True).flatten(2)[0].T


def test_a_grid_of_positions_is_interpolated_behind_its_class_token():
    source, target = Patches(4), Patches(6)
    plan = transfer_between_sizes(source, target, image(16), image(24))
    assert {name for name, origin in plan.origins.items() if origin != "exact"} == {"positions"}
    assert not plan.is_exact
    assert torch.equal(target.positions[:, 0], source.positions[:, 0])
    assert torch.allclose(target.positions[0, 1:], interpolated(source.positions[0, 1:], 6), atol=1e-6)


def test_biases_of_relative_positions_are_interpolated():
    source, target = Window(2), Window(4)
    plan = transfer_between_sizes(source, target, torch.randn(1, 4, 6), torch.randn(1, 16, 6))
    assert {name for name, origin in plan.origins.items() if origin != "exact"} == {"table"}
    assert not plan.is_exact
    assert torch.allclose(target.table, interpolated(source.table, 7), atol=1e-6)


@pytest.mark.parametrize(("length", "longer"), [(9, 25), (10, 23)])  # squares are no grids in a sequence
def test_a_longer_sequence_keeps_the_first_positions(length, longer):
    source, target = Sentence(length), Sentence(longer)
    tokens = torch.arange(8)[None]
    plan = transfer_between_sizes(source, target, tokens, tokens)
    assert plan.is_exact
    assert plan.origins["positions.weight"] == "grown"
    assert torch.equal(target.positions.weight[:length], source.positions.weight)
    assert torch.equal(source(tokens), target(tokens))


class Table(nn.Module):
    """A table with an entry for each channel and pixel, which is added."""

    def __init__(self, side):
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 8, side, side))

    def forward(self, x):
        return x + self.table


class Mixed(nn.Module):
    """A linear layer over tokens."""

    def __init__(self, tokens):
        super().__init__()
        self.mix = nn.Linear(tokens, tokens)

    def forward(self, x):
        return self.mix(x.flatten(2)).reshape(x.shape)


class ChannelAttention(nn.Module):
    """Gates from a convolution over channels (ECA, arXiv:1910.03151)."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x):
        return x * torch.sigmoid(self.gate(x.mean((2, 3))[:, None]))[:, 0, :, None, None]


class Rolled(nn.Module):
    """Channels in another order."""

    def forward(self, x):
        return x + torch.roll(x, 3, 1)


def around(part, width=8):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), part, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5)
    )


@pytest.mark.parametrize(
    "build",
    [lambda side: Table(side), lambda side: Mixed(side * side), lambda side: nn.LayerNorm([8, side, side])],
    ids=["table", "linear", "norm"],
)
def test_positions_that_cannot_be_resized_are_left_to_the_hypernetwork(build):
    source, target = around(build(4)), around(build(6))
    plan = transfer_between_sizes(source, target, image(4), image(6))
    assert not plan.is_exact
    lost = [name for name, origin in plan.origins.items() if origin == "none"]
    assert lost
    assert all(name.startswith("1.") for name in lost)
    assert torch.equal(source[0].weight, target[0].weight)


@pytest.mark.parametrize("width", [6, 12])
@pytest.mark.parametrize("part", [ChannelAttention, lambda: nn.LocalResponseNorm(3), Rolled])
def test_channels_that_are_neighbours_keep_their_number(part, width):
    source, target = around(part()), around(part(), width)
    plan = transfer_between_sizes(source, target, image(8), image(8))
    assert not plan.is_exact
    assert plan.origins["0.weight"] == plan.origins["4.weight"] == "none"
    assert transfer_between_sizes(source, around(part()), image(8), image(8)).is_exact


def test_kernels_of_transposed_convolutions_keep_their_size():
    source, target = around(nn.ConvTranspose2d(8, 8, 2, 2)), around(nn.ConvTranspose2d(8, 8, 4, 2, 1))
    plan = transfer_between_sizes(source, target, image(8), image(8))
    assert plan.origins["1.weight"] == "none"
    assert not plan.is_exact


@pytest.mark.slow
@pytest.mark.parametrize("name", ["encoder.pos_embedding", "pos_embed"])
def test_vision_transformers_for_larger_images(name):
    if name == "pos_embed":
        source, target = (timm_vit(embed_dim=32, img_size=size) for size in (16, 24))
    else:
        source, target = torchvision_vit(), of("torchvision", "VisionTransformer", 24, 4, 2, 2, 32, 64)
    plan = transfer_between_sizes(randomise(source, image(16), seed=0), target, image(16), image(24))
    assert {key for key, origin in plan.origins.items() if origin != "exact"} == {name}
    resample = import_timm().layers.resample_abs_pos_embed
    expected = resample(source.get_parameter(name), [6, 6], [4, 4], num_prefix_tokens=1)
    assert torch.allclose(target.get_parameter(name), expected, atol=1e-6)


@pytest.mark.slow
def test_swin_for_larger_images_is_the_same_network():
    source, target = randomise(swin(16, [2, 2], [2, 4]), image(32), seed=0), swin(16, [2, 2], [2, 4])
    plan = transfer_between_sizes(source, target, image(32), image(64))
    assert set(plan.origins.values()) == {"exact"}
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert largest_relative_difference(source(images), target(images)) == 0


@pytest.mark.slow
def test_swin_with_larger_windows():
    source = randomise(of("torchvision", "SwinTransformer", [2, 2], 16, [2, 2], [2, 4], [2, 2]), image(32), seed=0)
    target = swin(16, [2, 2], [2, 4])
    plan = transfer_between_sizes(source, target, image(32), image(32))
    tables = [name for name in plan.origins if name.endswith("relative_position_bias_table")]
    assert {name for name, origin in plan.origins.items() if origin != "exact"} == set(tables)
    for name in tables:
        expected = interpolated(source.get_parameter(name), 7)
        assert torch.allclose(target.get_parameter(name), expected, atol=1e-5)
