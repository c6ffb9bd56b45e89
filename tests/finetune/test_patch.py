"""A patch changes exactly the labels it was asked to change, within the neurons it may use."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ghn_client.errors import InfeasibleError, InvalidOptionError, UnsupportedModuleError
from ghn_client.finetune.patch.capacity import three_layer_neurons, two_layer_neurons
from ghn_client.finetune.patch.interpolants import bump_knots, neighbour_gaps
from ghn_client.finetune.patch.solver import patch
from tests.finetune.networks import ResidualNetwork, mlp


def problem(samples, changed, *, dimension=8, classes=3, seed=0):
    """A network, samples, and other labels than its own for the first ``changed`` of them."""
    generator = torch.Generator().manual_seed(seed)
    network = mlp(dimension, 16, classes, seed=seed).eval()
    inputs = torch.randn(samples, dimension, generator=generator)
    with torch.no_grad():
        labels = network(inputs).argmax(1)
    shift = torch.randint(1, classes, (changed,), generator=generator)
    return network, inputs[:changed], (labels[:changed] + shift) % classes, inputs[changed:], labels[changed:]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_patch_changes_n_labels_and_keeps_the_rest(data):
    samples = data.draw(st.integers(1, 120), label="samples")
    changed = data.draw(st.integers(1, samples), label="changed")
    depth = data.draw(st.sampled_from([2, 3]), label="depth")
    at = data.draw(st.sampled_from(["logits", "features"]), label="at")
    dimension = data.draw(st.integers(3, 12), label="dimension")
    network, wrong, wanted, keep, kept_labels = problem(
        samples, changed, dimension=dimension, classes=data.draw(st.integers(2, 5)), seed=data.draw(st.integers(0, 99))
    )
    result = patch(network, wrong, wanted, keep, depth=depth, at=at)
    assert result.certificate.holds
    assert torch.equal(result.module(wrong).argmax(1), wanted)
    assert torch.equal(result.module(keep).argmax(1), kept_labels)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.data())
def test_two_layers_never_use_more_than_the_bound(samples, data):
    changed = data.draw(st.integers(1, samples))
    network, wrong, wanted, keep, _ = problem(samples, changed)
    result = patch(network, wrong, wanted, keep, directions="shared")
    assert result.side.neurons <= two_layer_neurons(changed, samples)


@pytest.mark.parametrize(("samples", "changed"), [(12, 9), (43, 30), (43, 40)])
def test_kept_samples_beyond_the_last_changed_one_stay_when_neurons_are_short(samples, changed):
    network, wrong, wanted, keep, kept_labels = problem(samples, changed)
    result = patch(network, wrong, wanted, keep, directions="shared")
    assert torch.allclose(result.module(keep), network(keep), atol=0.01)
    assert torch.equal(result.module(keep).argmax(1), kept_labels)


def test_the_shared_line_needs_the_whole_bound_in_the_worst_case():
    values = torch.arange(20.0, dtype=torch.float64)
    changed = torch.arange(2, 20, 3)[:6]
    knots, _ = bump_knots(values, changed, torch.ones(6, 1, dtype=torch.float64), 1.0)
    assert len(knots) == two_layer_neurons(6, 20) == 18


@pytest.mark.parametrize("changed", [1, 3, 10, 40])
def test_on_a_line_no_two_layer_network_could_be_much_smaller(changed):
    """Isolated labels on a line: the difference of two logits has 2 N zeros, for which it needs 2 N - 1 kinks."""
    network = torch.nn.Linear(3, 2).eval()
    with torch.no_grad():
        network.weight.zero_()
        network.bias.copy_(torch.tensor([1.0, 0.0]))
    line = torch.arange(3.0 * changed)[:, None] * torch.tensor([[1.0, -0.5, 0.25]])
    is_wrong = torch.arange(len(line)) % 3 == 1
    result = patch(network, line[is_wrong], torch.ones(changed, dtype=torch.long), line[~is_wrong], directions="shared")
    with torch.no_grad():
        label = result.module(line).argmax(1)
    assert int((label.diff() != 0).sum()) == 2 * changed
    assert 2 * changed - 1 <= result.side.neurons <= two_layer_neurons(changed, len(line))


@pytest.mark.parametrize("samples", [50, 400])
def test_three_layers_use_four_root_two_n_per_output_whatever_the_number_of_samples(samples):
    network, wrong, wanted, keep, _ = problem(samples, 20, classes=2)
    result = patch(network, wrong, wanted, keep, depth=3)
    assert result.side.neurons == sum(three_layer_neurons(n) for n in torch.bincount(wanted).tolist())


def test_own_directions_hold_in_float32_where_the_shared_line_does_not():
    network, wrong, wanted, keep, _ = problem(2000, 40, dimension=64)
    assert patch(network, wrong, wanted, keep).certificate.precision == "float32"
    with pytest.raises(InfeasibleError):
        patch(network, wrong, wanted, keep, directions="shared", precision="float32")
    assert patch(network, wrong, wanted, keep, directions="shared").certificate.precision == "float64"


def test_a_float64_patch_takes_and_returns_the_precision_of_the_network():
    network, wrong, wanted, keep, _ = problem(60, 5)
    result = patch(network, wrong, wanted, keep, precision="float64")
    assert result.module(wrong).dtype == torch.float32
    assert result.side.center.dtype == torch.float64


def test_margin_is_reached():
    network, wrong, wanted, keep, _ = problem(60, 5)
    result = patch(network, wrong, wanted, keep, margin=3.0)
    assert result.certificate.smallest_margin == pytest.approx(3.0, abs=1e-3)


def test_patches_stack_and_come_off():
    network, wrong, wanted, keep, _ = problem(80, 10)
    first = patch(network, wrong[:5], wanted[:5], torch.cat([wrong[5:], keep]))
    second = patch(first.module, wrong[5:], wanted[5:], torch.cat([wrong[:5], keep]), at="features")
    assert torch.equal(second.module(wrong).argmax(1), wanted)
    with second.module.disabled():
        assert torch.equal(second.module(keep), first.module(keep))
    with first.module.disabled(), second.module.disabled():
        assert torch.equal(second.module(wrong), network(wrong))


def test_the_base_is_not_changed():
    network, wrong, wanted, keep, _ = problem(60, 5)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    outputs = network(keep)
    patch(network, wrong, wanted, keep)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert torch.equal(network(keep), outputs)


def test_narrow_bumps_touch_fewer_unseen_inputs():
    network, wrong, wanted, keep, _ = problem(300, 20)
    unseen = torch.randn(3000, 8, generator=torch.Generator().manual_seed(9))
    wide = patch(network, wrong, wanted, keep, directions="shared", reach=1.0, held_out_inputs=unseen).certificate
    narrow = patch(network, wrong, wanted, keep, directions="shared", reach=0.05, held_out_inputs=unseen).certificate
    assert narrow.touched < 0.3 * wide.touched
    assert wide.relabelled <= wide.touched


def test_equal_samples_with_equal_labels_are_one_sample():
    network, wrong, wanted, keep, _ = problem(60, 5)
    result = patch(network, torch.cat([wrong, wrong]), torch.cat([wanted, wanted]), torch.cat([keep, keep]))
    assert (result.certificate.num_changed, result.certificate.num_kept) == (5, 55)


def test_conflicts_are_refused():
    network, wrong, wanted, keep, _ = problem(60, 5)
    with pytest.raises(InfeasibleError):
        patch(network, torch.cat([wrong, wrong]), torch.cat([wanted, (wanted + 1) % 3]), keep)
    with pytest.raises(InfeasibleError):
        patch(network, wrong, wanted, torch.cat([keep, wrong[:1]]))


def test_train_mode_and_bad_options_are_refused():
    network, wrong, wanted, keep, _ = problem(60, 5)
    with pytest.raises(UnsupportedModuleError):
        patch(network.train(), wrong, wanted, keep)
    network.eval()
    for options in ({"depth": 4}, {"reach": 0.0}, {"margin": -1.0}, {"at": "nowhere"}, {"precision": "float16"}):
        with pytest.raises(InvalidOptionError):
            patch(network, wrong, wanted, keep, **options)
    with pytest.raises(InvalidOptionError):
        patch(network, wrong, wanted + 3, keep)
    with pytest.raises(InvalidOptionError):
        patch(network, wrong, wanted[:2], keep)


@pytest.mark.parametrize("depth", [2, 3])
def test_a_label_that_is_right_already_costs_nothing(depth):
    network, _, _, keep, labels = problem(60, 5)
    with torch.no_grad():
        margins = network(keep).topk(2).values
    sure = int((margins[:, 0] - margins[:, 1]).argmax())
    rest = torch.cat([keep[:sure], keep[sure + 1 :]])
    result = patch(network, keep[sure : sure + 1], labels[sure : sure + 1], rest, margin=1e-3, depth=depth)
    assert torch.equal(result.module(keep).argmax(1), labels)


def test_images_and_convolutions():
    torch.manual_seed(0)
    network = ResidualNetwork(4).eval()
    images = torch.rand(40, 3, 8, 8)
    with torch.no_grad():
        labels = network(images).argmax(1)
    for at in ("logits", "features"):
        result = patch(network, images[:4], (labels[:4] + 1) % 4, images[4:], at=at)
        assert result.certificate.holds


def test_gaps_agree_with_the_slow_way():
    t = torch.randn(50, dtype=torch.float64)
    chosen = torch.tensor([3, 17, 29])
    slow = torch.stack([(t - t[i]).abs()[torch.arange(50) != i].min() for i in chosen])
    assert torch.equal(neighbour_gaps(t, chosen), slow)


def test_neurons_grow_linearly_for_two_layers_and_as_the_root_for_three():
    counts = [4, 16, 64]
    neurons = {2: [], 3: []}
    for changed in counts:
        network, wrong, wanted, keep, _ = problem(400, changed, classes=2)
        wanted = torch.ones_like(wanted)
        for depth in (2, 3):
            directions = "shared"
            result = patch(network, wrong, wanted, keep, depth=depth, directions=directions, margin=20.0)
            neurons[depth].append(result.side.neurons)
    slopes = {depth: np.polyfit(np.log(counts), np.log(m), 1)[0] for depth, m in neurons.items()}
    assert slopes[2] == pytest.approx(1.0, abs=0.15)
    assert slopes[3] == pytest.approx(0.5, abs=0.15)
