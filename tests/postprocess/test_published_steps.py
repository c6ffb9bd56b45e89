"""Parity with the published post-processing, written here as plainly as the paper's recipe reads."""

from __future__ import annotations

import pytest
import torch

from ghn_service.postprocess.remedies import DiversityNoise, Orthogonal, row_correlation_std
from ghn_service.postprocess.steps import apply_step
from tests.postprocess.layer_examples import PLAIN, chain_graph, random_parameters


def published_network(tensors: dict[str, torch.Tensor]) -> torch.nn.Sequential:
    modules = []
    for name, tensor in tensors.items():
        if not name.endswith("weight"):
            continue
        if tensor.dim() == 4:
            module = torch.nn.Conv2d(tensor.shape[1], tensor.shape[0], 3)
        else:
            module = torch.nn.Linear(tensor.shape[1], tensor.shape[0])
        module.weight.data.copy_(tensor)
        modules.append(module)
    return torch.nn.Sequential(*modules)


def published_post_processing(network: torch.nn.Sequential, *, orth: bool, beta: float, layer: int) -> None:
    """The recipe: modules with a weight of two or more axes, counted from 1, the last one never touched."""
    modules = [module for module in network if module.weight.dim() >= 2]
    for count, module in enumerate(modules[:-1], start=1):
        if count < layer:
            continue
        weight = module.weight.data
        if beta > 0:
            rows = weight.reshape(weight.shape[0], -1)
            rows = rows.T if rows.shape[0] < rows.shape[1] else rows
            weight += beta * torch.corrcoef(rows).std() * torch.randn(weight.shape)
        if orth:
            rows = weight.reshape(weight.shape[0], -1)
            is_wide = rows.shape[0] < rows.shape[1]
            q, r = torch.linalg.qr(rows.T if is_wide else rows)
            q = q * torch.sign(torch.diag(r))
            weight.copy_((q.T if is_wide else q).reshape(weight.shape))


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_noise_then_qr_equals_the_published_algorithm(layer: int) -> None:
    graph = chain_graph(PLAIN)
    parameters = random_parameters(graph)
    network = published_network(dict(parameters))
    torch.manual_seed(3)
    published_post_processing(network, orth=True, beta=0.5, layer=layer)

    generator = torch.Generator().manual_seed(3)
    ours, _ = apply_step(DiversityNoise(beta=0.5, layer=layer), parameters, graph, generator=generator)
    ours, _ = apply_step(Orthogonal(method="qr", layer=layer), ours, graph, generator=generator)

    weights = [tensor for name, tensor in ours.items() if name.endswith("weight")]
    for module, weight in zip(network, weights, strict=True):
        torch.testing.assert_close(weight, module.weight.data, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (7, 7), (2, 1), (64, 2)])
def test_row_correlation_std_equals_the_one_of_the_whole_matrix(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tall = matrix if shape[0] >= shape[1] else matrix.T
    expected = float(torch.corrcoef(tall).std()) if min(shape) > 1 else 0.0
    assert row_correlation_std(matrix) == pytest.approx(expected, abs=1e-12)


def test_biases_and_the_classifier_stay_as_they_were() -> None:
    graph = chain_graph(PLAIN)
    parameters = random_parameters(graph)
    generator = torch.Generator().manual_seed(0)
    for step in (DiversityNoise(beta=1.0, layer=1), Orthogonal(method="polar", layer=1), Orthogonal(layer=1)):
        changed, _ = apply_step(step, parameters, graph, generator=generator)
        for name, tensor in parameters.items():
            is_kept = name.endswith("bias") or name.startswith("head")
            assert torch.equal(changed[name], tensor) == is_kept, name
