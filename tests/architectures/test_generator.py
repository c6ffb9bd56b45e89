"""Random architectures: determinism, splits, budgets."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ghn_architectures.cell_network import CellNetworkConfiguration
from ghn_architectures.families import FAMILIES
from ghn_architectures.generator import SIZES, Budget, sample_architecture
from ghn_architectures.registry import ARCHITECTURES
from ghn_architectures.resnet import ResNetConfiguration
from ghn_service.errors import InvalidOptionError

DRAWN = ["train", "val", "test", "wide", "deep", "dense", "bnfree"]
GOLDEN = "20bbb7ed2c64d929b0b9028be089c84f2844b7140f1f393a4c21fec0cce91845"

# sha256 of the digests of the first 50 graphs of each split (of all reference networks), for 3 x 32 x 32 images.
GOLDEN_GRAPHS = {
    "train": "2fb455ba0c9bf89e6bab76becb1bb3012b82af10c69b2a81bbad47dca42ca9d0",
    "val": "61a4ff66c24811309699dc11f68e35740be7d5fcacd493e38688f2f1284d1a47",
    "test": "ad22b0838c7cb4858dd15739d64cfa6ad789f70370235a6cd99f8178902602d4",
    "wide": "c5915761c3ec2fcfa458e82fdabc140fb5880e61af140fffc556ef460f9d1e51",
    "deep": "d82a111bba399d570d9b0396bae0f5b3598f4627fbaa918fe61021c4942aa49e",
    "dense": "9315c8597e36baabb3974994e068b2d5371e5b0c962ac4c20b5e74f52199aff9",
    "bnfree": "b5defaa28ee501db7fb29eef47bdaa141c476572eba70bc20dc63c69c63f7c34",
    "reference": "a3445e407bfa452e6cbc93dea3b38de1d9fbeb22a50d4038ee5d536057cff4d1",
}


def fingerprint(count: int) -> str:
    parts = [repr(sample_architecture(split, index)) for split in DRAWN if split != "deep" for index in range(count)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def graphs_fingerprint(split: str, count: int) -> str:
    count = min(count, len(ARCHITECTURES)) if split == "reference" else count
    digests = [sample_architecture(split, index).graph().digest() for index in range(count)]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


def test_a_version_of_the_generator_draws_the_same_networks_forever() -> None:
    """If this fails on purpose, raise GENERATOR_VERSION and renew the constant."""
    assert fingerprint(4) == GOLDEN


@pytest.mark.parametrize("split", [name for name in GOLDEN_GRAPHS if name != "deep"])
def test_graphs_of_fifty_networks_stay_as_they_are(split: str) -> None:
    """Checkpoints were trained on these graphs; a change here needs a new version of the generator,
    or of the digest where the networks stay the same."""
    assert graphs_fingerprint(split, 50) == GOLDEN_GRAPHS[split]


@pytest.mark.slow
def test_graphs_of_fifty_deep_networks_stay_as_they_are() -> None:
    assert graphs_fingerprint("deep", 50) == GOLDEN_GRAPHS["deep"]


def test_another_process_draws_the_same_networks() -> None:
    program = "from tests.architectures.test_generator import fingerprint; print(fingerprint(1))"
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == fingerprint(1)


def test_order_of_calls_does_not_matter() -> None:
    forward = [sample_architecture("train", index).configuration for index in range(5)]
    backward = [sample_architecture("train", index).configuration for index in reversed(range(5))]
    assert forward == backward[::-1]


def test_task_sizes_do_not_change_the_design() -> None:
    here = sample_architecture("test", 2)
    there = sample_architecture("test", 2, num_classes=100, in_channels=1, image_size=28)
    assert here.configuration == there.configuration


def test_splits_of_one_distribution_share_no_network() -> None:
    drawn = {
        split: {sample_architecture(split, index).configuration for index in range(40)}
        for split in ("train", "val", "test")
    }
    assert not drawn["train"] & drawn["val"]
    assert not drawn["train"] & drawn["test"]
    assert not drawn["val"] & drawn["test"]


@pytest.mark.parametrize("size", SIZES)
def test_size_bounds_cost(size: str) -> None:
    budget = SIZES[size]
    for index in range(12):
        architecture = sample_architecture("train", index, size=size)
        assert architecture.multiply_adds <= 1.15 * budget.most_multiply_adds
        assert architecture.num_parameters <= budget.most_parameters
        assert architecture.num_nodes <= budget.most_nodes


def test_own_budget_is_kept() -> None:
    budget = Budget(400_000, 900_000, most_parameters=50_000, most_nodes=60)
    architectures = [sample_architecture("train", index, budget=budget) for index in range(8)]
    assert all(budget.admits(architecture) for architecture in architectures)


def test_families_can_be_chosen() -> None:
    names = {sample_architecture("val", index, families=("resnet", "mlp")).family for index in range(20)}
    assert names == {"resnet", "mlp"}


def test_many_families_occur_in_train() -> None:
    names = [sample_architecture("train", index, size="tiny").family for index in range(40)]
    assert len(set(names)) >= 6
    assert set(names) <= set(FAMILIES)


def test_wide_networks_are_wider_than_those_of_train() -> None:
    def widest(split: str, index: int) -> int:
        graph = sample_architecture(split, index, families=("resnet",)).graph()
        shapes = [node.weight.shape for node in graph.nodes if node.weight is not None and len(node.weight.shape) == 4]
        return max(shape[0] for shape in shapes if shape[1] == 3)

    assert max(widest("train", index) for index in range(12)) < min(widest("wide", index) for index in range(12))


def test_deep_networks_have_more_nodes_than_those_of_train() -> None:
    most = max(budget.most_nodes for budget in SIZES.values())
    assert all(sample_architecture("deep", index).num_nodes > most for index in range(3))


def test_broad_is_train_with_deeper_and_wider_networks_among_it() -> None:
    networks = [sample_architecture("broad", index) for index in range(40)]
    parts = Counter(network.name.split("/")[0] for network in networks)
    assert set(parts) == {"train", "train_deep", "train_wide"}
    assert all(network == sample_architecture(network.name.split("/")[0], i) for i, network in enumerate(networks))


def test_deep_networks_to_train_on_have_up_to_18_blocks_in_a_stage() -> None:
    drawn = [sample_architecture("train_deep", index, families=("resnet",)).configuration for index in range(40)]
    depths = [max(item.depths) for item in drawn if isinstance(item, ResNetConfiguration)]
    assert sum(depth >= 5 for depth in depths) >= 36
    assert max(depths) == 18


def test_wide_networks_to_train_on_are_as_wide_as_those_of_wide() -> None:
    widths = [
        sample_architecture("train_wide", index, families=("convnet",)).configuration.widths[0] for index in range(12)
    ]
    assert min(widths) >= 64
    assert max(widths) >= 128


def test_dense_cells_have_more_steps_than_those_of_train() -> None:
    def steps(split: str, index: int) -> int:
        configuration = sample_architecture(split, index, families=("cells",)).configuration
        assert isinstance(configuration, CellNetworkConfiguration)
        cells = (configuration.genotype.normal, configuration.genotype.reduction)
        return max(len(cell.steps) + len(cell.outputs) for cell in cells)

    assert sum(steps("dense", index) for index in range(12)) > 1.5 * sum(steps("train", index) for index in range(12))


def test_bnfree_networks_have_no_norm() -> None:
    types = {node.op_type for index in range(10) for node in sample_architecture("bnfree", index).graph().nodes}
    assert not types & {"bn", "ln"}


def test_reference_is_the_registry() -> None:
    names = [sample_architecture("reference", index).name for index in range(len(ARCHITECTURES))]
    assert names == list(ARCHITECTURES)


@pytest.mark.parametrize(
    ("arguments", "keywords"),
    [
        (("trian", 0), {}),
        (("train", -1), {}),
        (("train", 0), {"size": "huge"}),
        (("train", 0), {"size": "tiny", "budget": SIZES["tiny"]}),
        (("train", 0), {"families": ("resnets",)}),
        (("train", 0), {"num_classes": 0}),
        (("reference", 10_000), {}),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple[str, int], keywords: dict[str, object]) -> None:
    with pytest.raises(InvalidOptionError) as caught:
        sample_architecture(*arguments, **keywords)  # type: ignore[arg-type]
    assert caught.value.field


def test_an_impossible_budget_is_refused() -> None:
    with pytest.raises(InvalidOptionError):
        sample_architecture("train", 0, budget=Budget(1, 2))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(split=st.sampled_from(["train", "val", "test", "bnfree"]), index=st.integers(0, 10**9))
def test_any_index_gives_a_network_that_its_graph_describes(split: str, index: int) -> None:
    architecture = sample_architecture(split, index, size="tiny")
    module = architecture.build(initialize=False)
    expected = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    graph = architecture.graph()
    assert {spec.name: spec.shape for spec in graph.parameters()} == expected
    assert [node.is_head for node in graph.nodes[-2:]] == [True, True]
