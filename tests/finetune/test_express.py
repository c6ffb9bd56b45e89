"""A frozen random network equals a trained one when only its norm parameters are set."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ghn_client.errors import InfeasibleError, InvalidOptionError, UnsupportedModuleError
from ghn_client.finetune.express import linear_system
from ghn_client.finetune.express.linear_system import (
    condition_of,
    khatri_rao,
    solve_gains,
    triangular_condition,
    unit_rows,
)
from ghn_client.finetune.express.pairing import random_norm_network
from ghn_client.finetune.express.solver import express, feasibility
from ghn_client.finetune.matrix_layers import norm_layers
from tests.finetune.networks import ResidualNetwork, mlp
from tests.finetune.real_images import cifar10, principal_components, train


def cnn(classes=10):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(4),
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, classes),
    )


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_a_trained_mlp_on_real_image_features_is_reproduced(sparsity):
    features, labels = principal_components(2000, 16)
    target = mlp(16, 16, 16, 10)
    train(target, features[:1000], labels[:1000], epochs=3)
    frozen = random_norm_network(target, sparsity=sparsity)
    result = express(target, frozen, inputs=features[:1000])
    test = features[1000:]
    assert torch.equal(result.module(test).argmax(1), target(test).argmax(1))
    assert result.certificate.error_float64 <= 1e-5
    assert result.certificate.error_float32 <= 1e-4
    assert result.certificate.exact


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_a_trained_cnn_on_real_images_is_reproduced(sparsity):
    images, labels = cifar10(300)
    target = cnn()
    train(target, images[:100], labels[:100], epochs=2)
    frozen = random_norm_network(target, sparsity=sparsity)
    result = express(target, frozen, inputs=images[:40])
    test = images[100:]
    assert torch.equal(result.module(test).argmax(1), target(test).argmax(1))
    assert result.certificate.error_float64 <= 1e-5
    assert result.certificate.error_float32 <= 1e-4


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_larger_networks_on_all_test_images(sparsity):
    images, labels = cifar10(10000)
    features, _ = principal_components(10000, 32)
    for target, inputs in ((mlp(32, 32, 32, 10), features), (cnn(), images)):
        train(target, inputs[:2000], labels[:2000], epochs=5)
        result = express(target, random_norm_network(target, sparsity=sparsity), inputs=inputs[:500])
        with torch.no_grad():
            predicted = torch.cat([result.module(chunk).argmax(1) for chunk in inputs.split(500)])
            wanted = torch.cat([target(chunk).argmax(1) for chunk in inputs.split(500)])
        assert torch.equal(predicted, wanted)
        assert result.certificate.error_float64 <= 1e-5
        assert result.certificate.error_float32 <= 1e-4


@pytest.mark.parametrize("sparsity", [0.5, 0.8])
@pytest.mark.parametrize("outputs", [1, 2, 10])
def test_any_layer_is_expressed_by_a_sparse_network_of_any_seed(sparsity, outputs):
    target = nn.Linear(12, outputs)
    inputs = torch.randn(50, 12, generator=generator())
    for seed in range(10):
        frozen = random_norm_network(target, sparsity=sparsity, generator=generator(seed))
        assert float((frozen.inner.weight != 0).float().mean()) == pytest.approx(1 - sparsity, abs=0.12)
        assert express(target, frozen, inputs=inputs).certificate.error_float64 <= 1e-5


def test_a_sparsity_that_no_width_mends_is_refused():
    with pytest.raises(InfeasibleError):
        random_norm_network(nn.Linear(3, 1), sparsity=0.9999)


@settings(max_examples=25, deadline=None)
@given(
    widths=st.lists(st.integers(1, 7), min_size=2, max_size=4),
    slack=st.sampled_from([1.25, 2.0]),
    seed=st.integers(0, 1000),
)
def test_any_mlp_is_expressed(widths, slack, seed):
    target = mlp(*widths, seed=seed).eval()
    inputs = torch.randn(30, widths[0], generator=generator(seed))
    result = express(target, random_norm_network(target, slack=slack, generator=generator(seed)), inputs=inputs)
    assert result.certificate.error_float64 <= 1e-5


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_convolution_is_expressed(data):
    groups = data.draw(st.sampled_from([1, 2]))
    layer = nn.Conv2d(
        groups * data.draw(st.integers(1, 2)),
        groups * data.draw(st.integers(1, 3)),
        data.draw(st.sampled_from([1, 2, 3])),
        stride=data.draw(st.sampled_from([1, 2])),
        padding=data.draw(st.sampled_from([0, 1])),
        dilation=data.draw(st.sampled_from([1, 2])),
        groups=groups,
        bias=data.draw(st.booleans()),
        padding_mode=data.draw(st.sampled_from(["zeros", "reflect"])),
    )
    target = nn.Sequential(layer, nn.ReLU()).eval()
    inputs = torch.randn(4, layer.in_channels, 7, 7, generator=generator())
    result = express(target, random_norm_network(target, slack=1.5), inputs=inputs)
    assert result.certificate.error_float64 <= 1e-5


def test_networks_with_branches_and_their_own_batch_norm():
    target = ResidualNetwork(3).eval()
    inputs = torch.rand(8, 3, 8, 8)
    result = express(target, random_norm_network(target), inputs=inputs)
    assert result.certificate.error_float64 <= 1e-5
    torch.testing.assert_close(result.module(inputs), target(inputs), atol=1e-4, rtol=1e-4)


def test_only_norm_parameters_differ_and_the_frozen_network_is_untouched():
    target = mlp(4, 4, 3).eval()
    frozen = random_norm_network(target)
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    result = express(target, frozen, inputs=torch.randn(20, 4))
    assert all(torch.equal(before[name], value) for name, value in frozen.state_dict().items())
    changed = {name for name, value in result.module.state_dict().items() if not torch.equal(value, before[name])}
    norms = {f"{name}.{p}" for name in norm_layers(frozen) for p in ("weight", "bias")}
    assert changed <= norms
    assert set(result.parameters) == norms


def test_the_seed_of_the_frozen_network_and_the_norm_parameters_are_the_model():
    target = mlp(4, 4, 3).eval()
    inputs = torch.randn(20, 4)
    result = express(target, random_norm_network(target, generator=generator(5)), inputs=inputs)
    again = random_norm_network(target, generator=generator(5))
    again.load_state_dict({name: value.float() for name, value in result.parameters.items()}, strict=False)
    assert torch.equal(again(inputs), result.module(inputs))


def test_a_plain_sequential_frozen_network_with_statistics_and_biases():
    target = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.1), nn.Linear(5, 3)).eval()
    target[1].running_mean.normal_()
    target[1].running_var.uniform_(0.5, 2.0)
    torch.manual_seed(3)
    frozen = nn.Sequential(
        nn.Linear(4, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, 5), nn.BatchNorm1d(5), nn.ReLU(),
        nn.Linear(5, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, 3), nn.BatchNorm1d(3),
    )  # fmt: skip
    for _ in range(3):
        frozen(torch.randn(64, 4))
    frozen.eval()
    result = express(target, frozen, inputs=torch.randn(50, 4))
    assert result.certificate.error_float64 <= 1e-5


def test_a_batch_norm_of_the_target_in_another_place_is_carried_over():
    target = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    target[2].running_mean.normal_()
    target[2].weight.data.uniform_(0.5, 2.0)
    result = express(target, random_norm_network(target), inputs=torch.randn(20, 3))
    assert result.certificate.error_float64 <= 1e-5


def test_outputs_agree_within_the_bound_everywhere_on_the_domain():
    target = mlp(4, 5, 3).eval()
    inputs = torch.randn(50, 4)
    result = express(target, random_norm_network(target), inputs=inputs)
    center = inputs.double().mean(0)
    radius = 1.5 * (inputs.double() - center).norm(dim=1).max()
    rays = torch.nn.functional.normalize(torch.randn(2000, 4, dtype=torch.float64), dim=1)
    ball = center + radius * rays * torch.rand(2000, 1, dtype=torch.float64)
    inside = result.covers(ball)
    assert inside.any()
    exact_target = copy.deepcopy(target).double()
    exact = copy.deepcopy(result.module).double()
    for name, value in result.parameters.items():
        exact.get_parameter(name).data.copy_(value)
    difference = (exact(ball[inside]) - exact_target(ball[inside])).abs().max()
    assert difference <= result.certificate.bound_float64 * result.certificate.largest_output
    single = (result.module(ball[inside].float()).double() - exact_target(ball[inside])).abs().max()
    assert single <= result.certificate.bound_float32 * result.certificate.largest_output


def test_inputs_far_outside_are_not_covered():
    target = mlp(4, 5, 3).eval()
    inputs = torch.randn(50, 4)
    result = express(target, random_norm_network(target), inputs=inputs)
    assert result.covers(inputs).all()
    assert not result.covers(100 * inputs).any()


def test_feasibility_says_what_is_short():
    target = mlp(4, 4, 3).eval()
    good = feasibility(target, random_norm_network(target))
    assert good.feasible
    assert [layer.needed for layer in good.layers] == [16, 12]
    narrow = copy.deepcopy(random_norm_network(target))
    narrow.get_submodule("0").inner = nn.Linear(4, 10, bias=False)
    narrow.get_submodule("0").outer = nn.Linear(10, 4, bias=False)
    narrow.get_submodule("0").norm1 = nn.BatchNorm1d(10).eval()
    report = feasibility(target, narrow)
    assert not report.feasible
    assert "6 channels short" in report.layers[0].short_of
    with pytest.raises(InfeasibleError):
        express(target, narrow, inputs=torch.randn(20, 4))
    approximate = express(target, narrow, inputs=torch.randn(200, 4), mode="least_squares").certificate
    assert not approximate.exact
    assert 0.0 < approximate.layers[0].weight_residual < 1.0


def test_networks_that_are_too_sparse_are_refused():
    target = mlp(6, 6, 3).eval()
    frozen = random_norm_network(target)
    with torch.no_grad():
        frozen.get_parameter("0.outer.weight")[:, 4:] = 0.0
    assert not feasibility(target, frozen).feasible
    with pytest.raises(InfeasibleError):
        express(target, frozen, inputs=torch.randn(20, 6))


def test_least_squares_improves_with_width():
    target = mlp(6, 6, seed=2).eval()
    inputs = torch.randn(300, 6)
    errors = []
    for width in (6, 18, 30):
        torch.manual_seed(0)
        frozen = nn.Sequential(
            nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 6), nn.BatchNorm1d(6)
        ).eval()
        errors.append(express(target, frozen, inputs=inputs, mode="least_squares").certificate.error_float64)
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.5 * errors[0]


def test_refusals_are_typed():
    inputs = torch.randn(10, 4)
    target = mlp(4, 4, 3).eval()
    frozen = random_norm_network(target)
    with pytest.raises(UnsupportedModuleError):
        express(target, copy.deepcopy(frozen).train(), inputs=inputs)
    layer_norm = copy.deepcopy(frozen)
    layer_norm.get_submodule("0").norm2 = nn.LayerNorm(4)
    with pytest.raises(UnsupportedModuleError):
        express(target, layer_norm, inputs=inputs)
    with pytest.raises(UnsupportedModuleError):
        random_norm_network(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))
    with pytest.raises(UnsupportedModuleError):
        random_norm_network(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train())
    with pytest.raises(UnsupportedModuleError):
        random_norm_network(nn.Sequential(nn.Linear(4, 4), nn.PReLU()))
    with pytest.raises(UnsupportedModuleError):
        express(target, mlp(4, 4, 3).eval(), inputs=inputs)
    with pytest.raises(InvalidOptionError):
        express(target, frozen, inputs=inputs, mode="guess")
    with pytest.raises(InvalidOptionError):
        random_norm_network(target, slack=0.5)


def test_gains_solve_the_system_and_round_best():
    a, b = torch.randn(3, 20, dtype=torch.float64), torch.randn(20, 4, dtype=torch.float64)
    w = torch.randn(3, 4, dtype=torch.float64)
    solution = solve_gains(a, b, w)
    torch.testing.assert_close((a * solution.gains) @ b, w, atol=1e-12, rtol=1e-12)
    lengths = a.norm(dim=0) * b.norm(dim=1)
    slow = torch.linalg.pinv((khatri_rao(a, b) / lengths[:, None]).T) @ w.flatten() / lengths
    torch.testing.assert_close(solution.gains, slow, atol=1e-10, rtol=1e-10)


def test_opposite_columns_make_the_float32_result_more_precise():
    target, inputs = mlp(16, 16, 10).eval(), torch.randn(200, 16, generator=generator())
    paired = random_norm_network(target)
    independent = copy.deepcopy(paired)
    for name in ("0", "2"):
        weight = independent.get_submodule(name).outer.weight
        weight.data = torch.randn(weight.shape, generator=generator()) / weight.shape[1] ** 0.5
    errors = [express(target, frozen, inputs=inputs).certificate.error_float32 for frozen in (paired, independent)]
    assert errors[0] < 0.6 * errors[1]


def test_channels_that_reach_nothing_get_no_gain():
    a, b = torch.randn(3, 20, dtype=torch.float64), torch.randn(20, 4, dtype=torch.float64)
    a[:, 5], b[7] = 0.0, 0.0
    solution = solve_gains(a, b, torch.randn(3, 4, dtype=torch.float64))
    assert solution.full_rank
    assert solution.gains[[5, 7]].abs().max() < 1e-12


def test_condition_by_iteration_agrees_with_singular_values(monkeypatch):
    a, b = torch.randn(5, 60, dtype=torch.float64), torch.randn(60, 8, dtype=torch.float64)
    exact = condition_of(a, b)
    monkeypatch.setattr(linear_system, "EXACT_CONDITION_SIZE", 0)
    triangle = torch.linalg.qr(unit_rows(a, b)[0], mode="r").R
    assert triangular_condition(triangle, iterations=300) == pytest.approx(exact, rel=0.02)


def test_a_little_more_width_than_the_theorem_asks_for_conditions_the_system():
    def condition(slack):
        width = int(slack * 256)
        a = torch.randn(16, width, generator=generator(1), dtype=torch.float64)
        b = torch.randn(width, 16, generator=generator(2), dtype=torch.float64)
        return condition_of(a, b)

    assert condition(1.25) < 60
    assert condition(2.0) < 15
    assert condition(1.0) > 3 * condition(1.25)
