"""The ladder of small networks: what contains which, and that the bundled files are what their cards say."""

from __future__ import annotations

import math

import pytest
import torch

from ghn_architectures.architecture import Interface
from ghn_architectures.registry import SOURCES, build_network
from ghn_architectures.vit import VisionTransformerConfiguration
from ghn_client.finetune.images import Normalization
from ghn_client.onnx.export import export_architecture
from ghn_client.outputs import largest_relative_difference
from ghn_service.training.evaluation.zero_shot import accuracy
from ghn_service.training.images import require_split
from ghn_service.transfer.auto import choose_source
from ghn_service.transfer.library import BUNDLED_SOURCES, Library, load_source, read_summary
from ghn_service.transfer.transfer import plan_transfer, transfer_weights
from tests.shared_data import shared_path
from tests.transfer.pairs import make_source, randomise, transfer_between

EXAMPLE = torch.zeros(1, 3, 32, 32)
BUNDLED = sorted(BUNDLED_SOURCES.glob("*.safetensors"))
MOST_BYTES = 12 * 2**20
TEST_IMAGES = 500
CONTAINERS = {
    "resnet20": "small_resnet",
    "resnet32": "small_resnet",
    "resnet56": "small_resnet",
    "resnet110": "small_resnet",
    "resnet18": "small_resnet18",
    "resnet50": "small_resnet50",
    "wide_resnet16_4": "small_wide_resnet",
    "vgg11_bn": "small_vgg11_bn",
    "vgg16_bn": "small_vgg11_bn",
    "mobilenet_v2": "small_mobilenet_v2",
}


LARGER_VIT = VisionTransformerConfiguration(192, 8, 6, convolutional_stem=True)


@pytest.mark.parametrize("name", [*CONTAINERS, "a larger vit"])
def test_larger_networks_compute_what_the_small_ones_in_them_do(name):
    source = randomise(SOURCES[CONTAINERS.get(name, "small_vit")].build(Interface()), EXAMPLE, seed=0)
    target = build_network(name) if name in CONTAINERS else LARGER_VIT.build(Interface())
    result = transfer_between(source, target, EXAMPLE)
    assert result.plan.is_exact
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert largest_relative_difference(source(images), target(images)) < 1e-4


@pytest.mark.parametrize("name", ["resnet32", "vgg16_bn"])
def test_containment_does_not_depend_on_the_classes(name):
    source = make_source(SOURCES[CONTAINERS[name]].build(Interface()), EXAMPLE)
    plan = plan_transfer(source, export_architecture(build_network(name, num_classes=7), EXAMPLE))
    assert (plan.contains_source, plan.is_exact) == (True, False)
    assert plan_transfer(source, export_architecture(build_network(name), EXAMPLE), head="reset").contains_source
    plan = plan_transfer(source, export_architecture(build_network("resnet20_normfree", num_classes=7), EXAMPLE))
    assert not plan.contains_source


@pytest.mark.parametrize(("examples", "size"), [(2, 32), (5, 32), (2, 48)])
def test_how_many_examples_a_file_was_made_with_does_not_matter(examples, size):
    source = load_source(BUNDLED_SOURCES / "small_resnet.safetensors")
    structure = export_architecture(build_network("resnet32"), torch.zeros(examples, 3, size, size))
    assert plan_transfer(source, structure).is_exact


def test_the_library_is_small():
    assert sum(path.stat().st_size for path in BUNDLED) <= MOST_BYTES


@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: path.stem)
def test_a_bundled_source_is_what_its_card_says(path):
    source, summary = load_source(path), read_summary(path)
    assert source.digest == summary.digest
    assert summary.digest in (BUNDLED_SOURCES / "README.md").read_text()
    assert source.card.accuracy >= 0.85
    assert source.card.licence
    assert source.card.command.startswith(f"ghn-train source {path.stem} ")
    images = require_split(shared_path("data/cifar10"), "test").first(TEST_IMAGES)
    module = SOURCES[path.stem].build(Interface())
    module.load_state_dict(source.tensors, strict=False)
    measured = accuracy(module.eval(), images, Normalization(**source.card.normalization), batch_size=250)
    assert abs(measured - source.card.accuracy) < 4 * math.sqrt(0.1 * 0.9 / TEST_IMAGES)


@pytest.mark.parametrize("name", CONTAINERS)
def test_auto_takes_the_small_network_that_is_contained(name):
    if not (BUNDLED_SOURCES / f"{CONTAINERS[name]}.safetensors").exists():
        pytest.skip(f"{CONTAINERS[name]} is not trained yet")
    target = build_network(name)
    structure = export_architecture(target, EXAMPLE)
    choice = choose_source(Library(), structure)
    assert choice.source is not None
    assert choice.source.name == CONTAINERS[name]
    assert choice.plan is not None
    assert choice.plan.is_exact
    found = transfer_weights(choice.source, structure, choice.plan)
    target.load_state_dict({**found.tensors, **found.statistics}, strict=False)
    source = SOURCES[CONTAINERS[name]].build(Interface())
    source.load_state_dict(choice.source.tensors, strict=False)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert largest_relative_difference(source.eval()(images), target.eval()(images)) < 1e-4
