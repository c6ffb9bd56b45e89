import pytest
import torch

from ghn_client.onnx.export import export_architecture
from ghn_client.outputs import largest_relative_difference
from ghn_service.errors import SourceError
from ghn_service.transfer.source import Source
from ghn_service.transfer.transfer import plan_transfer, transfer_weights
from tests.transfer.pairs import Residual, make_source, randomise, transfer_between

EXAMPLE = torch.zeros(1, 3, 16, 16)


def trained(widths=(8, 12), depths=(1, 1), seed=0, **options):
    return randomise(Residual(widths, depths, **options), EXAMPLE, seed=seed)


def difference(source, target):
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = source(images)
        assert largest_relative_difference(expected[:2], expected[2:]) > 0.1  # the source does tell images apart
        return largest_relative_difference(expected, target(images))


@pytest.mark.parametrize(
    "options",
    [
        {"widths": (17, 31)},
        {"widths": (32, 48)},
        {"depths": (3, 3)},
        {"inner": 2.5},
        {"kernel": 5},
        {"widths": (16, 20), "depths": (2, 3), "kernel": 7, "inner": 1.5},
    ],
    ids=str,
)
def test_a_target_that_contains_the_source_computes_what_it_computes(options):
    source, target = trained(), trained(seed=1, **options)
    result = transfer_between(source, target, EXAMPLE)
    assert result.plan.is_exact
    assert difference(source, target) <= 1e-4


def test_the_same_network_is_the_same_bit_for_bit():
    source, target = trained(), trained(seed=1)
    result = transfer_between(source, target, EXAMPLE)
    assert result.plan.is_exact
    assert result.plan.similarity == 1
    assert set(result.plan.origins.values()) == {"exact"}
    for name, value in source.state_dict().items():
        if "num_batches" not in name:
            assert torch.equal(value, target.state_dict()[name])


def test_a_cut_stream_keeps_the_same_channels_everywhere(monkeypatch):
    monkeypatch.setattr("ghn_service.transfer.cutting.MAX_CHANNELS", 0)
    source, target = trained(widths=(16, 20)), trained(widths=(12, 20), seed=1)
    with torch.no_grad():
        for position, (name, value) in enumerate(source.state_dict().items()):
            if name in ("stem.1.weight", "blocks.0.last_norm.weight", "blocks.0.last_norm.bias", "stem.1.bias"):
                value.copy_(torch.arange(16) + 100.0 * position)
    result = transfer_between(source, target, EXAMPLE)
    assert not result.plan.is_exact
    assert any("16 to 12" in group for group in result.plan.cut_groups)
    kept = [result.tensors[name] % 100 for name in ("stem.1.weight", "blocks.0.last_norm.weight", "stem.1.bias")]
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(kept[0], kept[2])
    columns = source.state_dict()["blocks.1.first.weight"][:, kept[0].long()]
    assert torch.equal(result.tensors["blocks.1.first.weight"], columns)


def test_another_number_of_classes_resets_the_class_layer_alone():
    source, target = trained(), trained(seed=1)
    target.head = torch.nn.Linear(12, 7)
    plan = plan_transfer(make_source(source, EXAMPLE), export_architecture(target, EXAMPLE))
    assert {name for name, origin in plan.origins.items() if origin == "none"} == {"head.weight", "head.bias"}
    assert not plan.is_exact
    with pytest.raises(SourceError):
        plan_transfer(make_source(source, EXAMPLE), export_architecture(target, EXAMPLE), head="keep")


@pytest.mark.parametrize("end", [[], [torch.nn.Sigmoid()], [torch.nn.Flatten(0)]], ids=str)
def test_a_class_layer_of_one_class_is_reset_where_one_asks(end):
    def network(activation):
        layers = [torch.nn.Conv2d(3, 8, 3), activation, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()]
        return torch.nn.Sequential(*layers, torch.nn.Linear(8, 1), *end)

    source = make_source(network(torch.nn.ReLU()), EXAMPLE)
    for activation, contains_source in ((torch.nn.ReLU(), True), (torch.nn.Tanh(), False)):
        target = export_architecture(network(activation), EXAMPLE)
        plan = plan_transfer(source, target, head="reset")
        assert {name for name, origin in plan.origins.items() if origin == "none"} == {"4.weight", "4.bias"}
        assert (plan.contains_source, plan.is_exact) == (contains_source, False)
        assert plan_transfer(source, target).is_exact == contains_source


def test_a_source_without_weights_is_refused():
    structure = export_architecture(trained(), EXAMPLE)
    with pytest.raises(SourceError):
        plan_transfer(Source("empty", structure, {}), structure)


def test_transfers_repeat():
    source, target = make_source(trained(), EXAMPLE), export_architecture(trained(widths=(13, 17)), EXAMPLE)
    one, other = (transfer_weights(source, target, seed=3) for _ in range(2))
    assert all(torch.equal(value, other.tensors[name]) for name, value in one.tensors.items())
