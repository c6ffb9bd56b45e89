"""The separate passes of hypernetwork and target network give the gradient of the plain, joined computation."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from ghn_service.hypernetwork.features import collate
from ghn_service.hypernetwork.ghn import GHNConfig, GraphHyperNetwork
from ghn_service.training.networks import prepare_network
from ghn_service.training.settings import ObjectiveSettings
from ghn_service.training.step import LossRecorder, add_penalty_gradient, make_recorder, measure_loss
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


def replay_by_running(run):
    """A recorder without a GPU: runs again on the same tensors, and writes into the tensors of the first result."""
    result = run()

    def replay():
        again = run()
        result.loss.copy_(again.loss)
        result.accuracy.copy_(again.accuracy)
        for name, gradient in again.gradients.items():
            result.gradients[name].copy_(gradient)

    return replay, result


def cannot_record(run):
    raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize(
    ("record", "has_room"), [(replay_by_running, True), (replay_by_running, False), (cannot_record, True)]
)
def test_recorded_passes_give_what_plain_ones_give(case, record, has_room):
    hypernetwork, network, batches = case
    recorder = LossRecorder(record, lambda: has_room)
    with torch.no_grad():
        predicted = hypernetwork(collate([network.features]))[0]
    for shift in (0.0, 0.1, 0.2):
        weights = {name: tensor + shift for name, tensor in predicted.items()}
        examples = [(images + shift, labels.flip(0)) for images, labels in batches]
        arguments = (weights, examples, ObjectiveSettings())
        found = recorder(network, *arguments, precision=torch.float32)
        expected = measure_loss(network.module, weights, network.constants, examples, ObjectiveSettings())
        assert torch.equal(found.loss, expected.loss)
        for name, gradient in expected.gradients.items():
            assert torch.equal(found.gradients[name], gradient), name


def test_nothing_is_recorded_on_a_processor():
    assert make_recorder(torch.device("cpu")) is None


@pytest.mark.gpu
def test_a_step_on_a_gpu_waits_for_nothing_and_replays_what_it_records(case):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    _, _, batches = case
    device = torch.device("cuda")
    network = prepare_network(3, SmallArchitecture(3, image_size=16, num_classes=4), CONFIG, device)
    hypernetwork = GraphHyperNetwork(CONFIG, generator=torch.Generator().manual_seed(0)).to(device)
    batches = [(images.to(device), labels.to(device)) for images, labels in batches]
    with torch.no_grad():
        predicted = hypernetwork(collate([network.features]).to(device))[0]
    settings, recorder = ObjectiveSettings(), make_recorder(device)
    plain = [measure_loss(network.module, predicted, network.constants, batches, settings) for _ in range(2)][-1]
    recorder(network, predicted, batches, settings, precision=torch.float32)
    torch.cuda.set_sync_debug_mode("error")
    try:
        measure_loss(network.module, predicted, network.constants, batches, settings)
        found = recorder(network, predicted, batches, settings, precision=torch.float32)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found.loss, plain.loss)
    for name, gradient in plain.gradients.items():
        torch.testing.assert_close(found.gradients[name], gradient, rtol=1e-3, atol=1e-5)
