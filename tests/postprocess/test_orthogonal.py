"""Orthogonalisation: what is orthogonal afterwards, what is kept, and which matrices are treated apart."""

from __future__ import annotations

import pytest
import torch

from ghn_service.graph.architecture import LayerAttributes
from ghn_service.postprocess.remedies import Orthogonal, orthogonalize, overlap_with
from ghn_service.postprocess.steps import apply_step
from ghn_service.postprocess.weighted_layers import to_torch_layout
from tests.postprocess.layer_examples import (
    ExampleLayer,
    chain_graph,
    random_parameters,
    tiled_weight,
    with_tensor,
)


def apply_to(layer: ExampleLayer, step: Orthogonal, tensor: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    graph = chain_graph([layer, ExampleLayer("head.weight", (3, 4), is_head=True)])
    parameters = random_parameters(graph)
    if tensor is not None:
        parameters = with_tensor(parameters, layer.name, tensor)
    changed, record = apply_step(step, parameters, graph, generator=torch.Generator())
    spec = parameters.specs[layer.name]
    before = to_torch_layout(parameters[layer.name], spec)
    return before, to_torch_layout(changed[layer.name], spec), record.layers[0].outcome


@pytest.mark.parametrize("method", ["qr", "polar"])
@pytest.mark.parametrize("shape", [(1, 6, 20), (1, 20, 6), (3, 5, 5)])
def test_all_singular_values_become_one(method: str, shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrices, method=method, keep_rms=False))
    torch.testing.assert_close(values, torch.ones_like(values))


@pytest.mark.parametrize("method", ["qr", "polar"])
def test_each_matrix_keeps_its_root_mean_square_if_asked(method: str) -> None:
    scale = torch.tensor([0.01, 1.0, 30.0]).view(3, 1, 1)
    matrices = torch.randn((3, 5, 9), generator=torch.Generator().manual_seed(0)) * scale
    result = orthogonalize(matrices, method=method, keep_rms=True)
    before, after = (values.square().mean(dim=(1, 2)).sqrt() for values in (matrices, result))
    torch.testing.assert_close(before, after)


def test_polar_keeps_more_of_a_tiled_prediction_than_qr() -> None:
    tiled = tiled_weight(256, 512, 32).unsqueeze(0)
    overlaps = {
        method: overlap_with(tiled, orthogonalize(tiled, method=method, keep_rms=False)) for method in ("qr", "polar")
    }
    assert overlaps["polar"] > 1.3 * overlaps["qr"] > 0


def test_polar_is_the_nearest_semi_orthogonal_matrix() -> None:
    matrix = torch.randn((1, 8, 12), generator=torch.Generator().manual_seed(0))
    nearest = (orthogonalize(matrix, method="polar", keep_rms=False) - matrix).norm()
    for seed in range(20):
        other = torch.randn((1, 8, 12), generator=torch.Generator().manual_seed(seed + 1)) * 0.1 + matrix
        assert nearest <= (orthogonalize(other, method="qr", keep_rms=False) - matrix).norm() + 1e-5


def test_the_groups_of_a_convolution_are_orthogonal_each_by_itself() -> None:
    layer = ExampleLayer("grouped.weight", (8, 3, 3, 3), attributes=LayerAttributes(groups=2))
    _, after, _ = apply_to(layer, Orthogonal(method="polar", keep_rms=False, layer=1))
    for group in after.flatten(1).chunk(2):
        torch.testing.assert_close(group @ group.T, torch.eye(4), rtol=0, atol=1e-5)


@pytest.mark.parametrize("groups", [2, 64])
def test_qr_reads_the_whole_weight_of_a_grouped_convolution_as_one_tall_matrix(groups: int) -> None:
    layer = ExampleLayer("grouped.weight", (64, 64 // groups, 3, 3), attributes=LayerAttributes(groups=groups))
    before, after, outcome = apply_to(layer, Orthogonal(method="qr", layer=1))
    rows = before.flatten(1)
    is_wide = rows.shape[0] < rows.shape[1]
    q, r = torch.linalg.qr(rows.T if is_wide else rows)
    published = q * torch.sign(torch.diag(r))
    torch.testing.assert_close(after.flatten(1), published.T if is_wide else published)
    assert outcome == "changed"


def test_packed_projections_are_orthogonal_each_by_itself() -> None:
    layer = ExampleLayer("qkv.weight", (18, 6), attributes=LayerAttributes(packed=3))
    _, after, _ = apply_to(layer, Orthogonal(method="polar", keep_rms=False, layer=1))
    for projection in after.chunk(3):
        torch.testing.assert_close(projection @ projection.T, torch.eye(6), rtol=0, atol=1e-5)


def test_a_transposed_weight_gives_the_transposed_result() -> None:
    plain, transposed = ExampleLayer("a.weight", (6, 10)), ExampleLayer("a.weight", (10, 6), permutation=(1, 0))
    weight = torch.randn((6, 10), generator=torch.Generator().manual_seed(5))
    _, expected, _ = apply_to(plain, Orthogonal(layer=1), weight)
    _, result, _ = apply_to(transposed, Orthogonal(layer=1), weight.T.contiguous())
    torch.testing.assert_close(result, expected)


def test_a_depthwise_layer_that_keeps_its_scale_is_left_alone_and_said_so() -> None:
    layer = ExampleLayer("depthwise.weight", (8, 1, 3, 3), attributes=LayerAttributes(groups=8))
    before, after, outcome = apply_to(layer, Orthogonal(method="polar", layer=1))
    assert torch.equal(before, after)
    assert outcome == "kept"


def test_a_weight_of_zeros_stays_zero_when_the_scale_is_kept() -> None:
    layer = ExampleLayer("zero.weight", (4, 6))
    _, after, _ = apply_to(layer, Orthogonal(method="polar", layer=1), torch.zeros(4, 6))
    assert torch.equal(after, torch.zeros(4, 6))
