"""The separate passes of hypernetwork and target network give the gradient of the plain, joined computation."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from ghn_service.hypernetwork.features import collate
from ghn_service.hypernetwork.ghn import GHNConfig, GraphHyperNetwork
from ghn_service.training.networks import prepare_network
from ghn_service.training.settings import ObjectiveSettings
from ghn_service.training.step import add_penalty_gradient, measure_loss
from tests.training.small_networks import SmallArchitecture

CONFIG = GHNConfig(hidden_channels=8, num_heads=2, num_layers=1, max_shape=(8, 8, 5, 5), num_classes=4)


@pytest.fixture
def case():
    hypernetwork = GraphHyperNetwork(CONFIG, generator=torch.Generator().manual_seed(0))
    network = prepare_network(3, SmallArchitecture(3, image_size=16, num_classes=4), CONFIG, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    batches = [
        (torch.randn(6, 3, 16, 16, generator=generator), torch.randint(0, 4, (6,), generator=generator))
        for _ in range(2)
    ]
    return hypernetwork, network, batches


def test_gradient_is_that_of_the_joined_computation(case):
    hypernetwork, network, batches = case
    settings = ObjectiveSettings(label_smoothing=0.1, penalty=1e-3)
    batch = collate([network.features])
    predicted = hypernetwork(batch)[0]
    result = measure_loss(network.module, predicted, network.constants, batches, settings)
    torch.autograd.backward(list(predicted.values()), list(result.gradients.values()))
    split = [parameter.grad for parameter in hypernetwork.parameters()]

    hypernetwork.zero_grad()
    predicted = hypernetwork(batch)[0]
    losses = [
        functional.cross_entropy(
            torch.func.functional_call(network.module, {**network.constants, **predicted}, (images,)),
            labels,
            label_smoothing=0.1,
        )
        for images, labels in batches
    ]
    loss = sum(losses) / 2 + 1e-3 * sum(tensor.norm() for tensor in predicted.values())
    loss.backward()
    for one, other in zip(split, [parameter.grad for parameter in hypernetwork.parameters()], strict=True):
        if other is None:
            assert one is None or not one.any()
        else:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_nan_in_a_prediction_is_noticed(case):
    hypernetwork, network, batches = case
    predicted = dict(hypernetwork(collate([network.features]))[0])
    name = next(iter(predicted))
    predicted[name] = predicted[name].detach() * float("nan")
    result = measure_loss(network.module, predicted, network.constants, batches, ObjectiveSettings())
    assert not result.is_finite


def test_penalty_gradient_equals_autograd():
    predicted = {"a": torch.randn(3, 4, requires_grad=True), "b": torch.randn(5, requires_grad=True)}
    gradients = {name: torch.zeros_like(tensor) for name, tensor in predicted.items()}
    add_penalty_gradient(gradients, predicted, 0.3)
    (0.3 * sum(tensor.norm() for tensor in predicted.values())).backward()
    for name, tensor in predicted.items():
        torch.testing.assert_close(gradients[name], tensor.grad)


def test_bfloat16_passes_give_about_the_same_gradient(case):
    hypernetwork, network, batches = case
    with torch.no_grad():
        predicted = hypernetwork(collate([network.features]))[0]
    exact = measure_loss(network.module, predicted, network.constants, batches, ObjectiveSettings())
    rough = measure_loss(
        network.module, predicted, network.constants, batches, ObjectiveSettings(), precision=torch.bfloat16
    )
    for name, gradient in exact.gradients.items():
        if gradient.norm() > 1e-4:
            similarity = functional.cosine_similarity(gradient.flatten(), rough.gradients[name].flatten(), dim=0)
            assert similarity > 0.9
