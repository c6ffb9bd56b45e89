"""The networks as torch modules: shapes, gradients, initialisation, registry."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from ghn_architectures.architecture import Interface
from ghn_architectures.families import FAMILIES
from ghn_architectures.generator import sample_architecture
from ghn_architectures.layers import Conv2d, round_channels, skip_initialization
from ghn_architectures.registry import ARCHITECTURES, build_network, reference_architecture
from ghn_architectures.resnet import ResNetConfiguration
from ghn_service.errors import InvalidOptionError

SMALL = ("resnet20", "densenet40", "se_mobilenet_mini", "convnext_atto", "vit_mini", "swin_mini", "mlp", "vgg11")
# Million parameters for 10 classes; He et al. (table 6), Zagoruyko and Komodakis (table 4), Huang et al. (table 2).
PUBLISHED_MILLIONS = {
    "resnet20": 0.27,
    "resnet32": 0.46,
    "resnet56": 0.85,
    "resnet110": 1.7,
    "wide_resnet16_4": 2.7,
    "wide_resnet28_10": 36.5,
    "densenet100": 0.8,
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("image_size", [28, 32])
def test_every_parameter_of_every_family_gets_a_gradient(family: str, image_size: int) -> None:
    torch.manual_seed(0)
    architecture = sample_architecture(
        "train", 5, families=(family,), size="tiny", num_classes=6, in_channels=1, image_size=image_size
    )
    module = architecture.build()
    images = torch.randn(4, 1, image_size, image_size).to(memory_format=torch.channels_last)
    logits = module(images)
    assert logits.shape == (4, 6)
    gradients = torch.autograd.grad(F.cross_entropy(logits, torch.arange(4)), list(module.parameters()))
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("name", SMALL)
def test_reference_networks_run_for_other_interfaces(name: str) -> None:
    module = build_network(name, num_classes=5, in_channels=1, image_size=28).eval()
    with torch.no_grad():
        assert module(torch.zeros(2, 1, 28, 28)).shape == (2, 5)


@pytest.mark.parametrize("image_size", [28, 33, 48, 64])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_shapes_of_reference_networks_fit_at_every_size(name: str, image_size: int) -> None:
    assert reference_architecture(name, Interface(5, 1, image_size)).num_nodes > 2


@pytest.mark.slow
@pytest.mark.parametrize("image_size", [28, 32, 33, 48, 64])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_reference_network_runs_at_every_size(name: str, image_size: int) -> None:
    module = build_network(name, num_classes=5, in_channels=1, image_size=image_size).eval()
    with torch.inference_mode():
        assert module(torch.zeros(1, 1, image_size, image_size)).shape == (1, 5)


@pytest.mark.parametrize("image_size", [28, 33, 49])
@pytest.mark.parametrize("shortcut", ["conv", "pool", "pad"])
@pytest.mark.parametrize("block", ["basic", "bottleneck", "preactivation"])
def test_shortcuts_fit_their_branches_at_odd_sizes(block: str, shortcut: str, image_size: int) -> None:
    configuration = ResNetConfiguration((8, 16, 32), (1, 1, 1), block=block, shortcut=shortcut, kernel=5)
    module = configuration.build(Interface(5, 1, image_size)).eval()
    with torch.inference_mode():
        assert module(torch.zeros(1, 1, image_size, image_size)).shape == (1, 5)


@pytest.mark.parametrize(("name", "millions"), PUBLISHED_MILLIONS.items())
def test_parameter_counts_are_the_published_ones(name: str, millions: float) -> None:
    assert reference_architecture(name).num_parameters / 1e6 == pytest.approx(millions, rel=0.035)


def test_multiply_adds_of_resnet20_are_the_published_ones() -> None:
    assert reference_architecture("resnet20").multiply_adds == pytest.approx(40.8e6, rel=0.01)


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(InvalidOptionError) as caught:
        build_network("resnet21")
    assert all(name in str(caught.value) for name in ARCHITECTURES)


@pytest.mark.parametrize("keywords", [{"num_classes": 0}, {"in_channels": 0}, {"image_size": 8}])
def test_impossible_sizes_are_refused(keywords: dict[str, int]) -> None:
    with pytest.raises(InvalidOptionError) as caught:
        Interface(**keywords)
    assert caught.value.field in keywords


def test_building_is_seeded_by_torch() -> None:
    first, second = (_seeded("resnet20") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def _seeded(name: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return build_network(name).state_dict()


def test_convolutions_start_with_the_variance_of_he() -> None:
    torch.manual_seed(0)
    weight = Conv2d(64, 128, 3).weight
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)


def test_initialisation_can_be_skipped_and_comes_back() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    with skip_initialization():
        layer = Conv2d(8, 8, 3)
    assert torch.equal(torch.get_rng_state(), state)
    layer.reset_parameters()
    assert not torch.equal(torch.get_rng_state(), state)


def test_buffers_are_initialised_even_where_weights_are_not() -> None:
    module = reference_architecture("resnet20").build(initialize=False)
    norms = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert norms
    assert all(bool((norm.running_mean == 0).all() and (norm.running_var == 1).all()) for norm in norms)


@pytest.mark.parametrize(("value", "rounded"), [(3, 8), (8, 8), (12, 16), (19.9, 24), (60, 64), (100, 104)])
def test_channels_are_multiples_of_eight(value: float, rounded: int) -> None:
    assert round_channels(value) == rounded
