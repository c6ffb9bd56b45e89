"""One suite over all decoders, and each against its formula written out without any cropping or batching."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ghn_service.graph.architecture import Node
from ghn_service.hypernetwork.decoders import DECODERS
from ghn_service.hypernetwork.features import build_features, is_tiled
from ghn_service.hypernetwork.ghn import GraphHyperNetwork
from tests.hypernetwork.small_graphs import CONFIGS, SMALL, bias, chain, conv, norm, small_ghn

EXTREMES = [
    (1, 1, 1, 1),
    (1, 64, 3, 3),
    (64, 1, 5, 5),
    (7, 9, 1, 7),
    (7, 9, 7, 1),
    (6, 3, 2, 4),
    (6, 3, 16, 16),
    (64, 48),
    (1, 3),
    (12, 8, 9),
]


def decode_one(ghn: GraphHyperNetwork, node: Node, embedding: Tensor, *, seed: int = 0) -> dict[str, Tensor]:
    """The tensors of one node, tiled."""
    targets = build_features(chain(node), ghn.config).targets
    embeddings = torch.stack((torch.zeros_like(embedding), embedding))
    tensors = {}
    for group, blocks in ghn.decode_blocks(embeddings, targets, seed=seed):
        for target, block in zip(group, blocks, strict=True):
            index = torch.meshgrid(
                *(torch.arange(size) % len_ for size, len_ in zip(target.shape, block.shape, strict=True)),
                indexing="ij",
            )
            tensors[target.name] = block[index]
    return tensors


@pytest.fixture
def embedding() -> Tensor:
    return torch.randn(SMALL.hidden_channels, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("shape", EXTREMES, ids=str)
def test_any_shape_is_decoded(decoder, shape, embedding):
    ghn = small_ghn(dataclasses.replace(SMALL, decoder=decoder))
    found = decode_one(ghn, conv("w", *shape), embedding)["w"]
    assert found.shape == shape
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("shape", EXTREMES, ids=str)
def test_blocks_are_smaller_exactly_where_values_repeat(decoder, shape, embedding):
    ghn = small_ghn(dataclasses.replace(SMALL, decoder=decoder))
    (target,) = build_features(chain(conv("w", *shape)), ghn.config).targets
    ((_, blocks),) = ghn.decode_blocks(torch.stack((embedding, embedding)), [target])
    assert (blocks.shape[1:] != shape) == is_tiled(target, ghn.config)


@pytest.mark.parametrize("decoder", DECODERS)
def test_different_nodes_get_different_weights(decoder, embedding):
    ghn = small_ghn(dataclasses.replace(SMALL, decoder=decoder))
    first, second = (decode_one(ghn, conv("w", 8, 8, 3, 3), factor * embedding)["w"] for factor in (1, 2))
    assert (first - second).std() > 0.01 * first.std()


@pytest.mark.parametrize("kind", CONFIGS)
def test_norms_and_biases_are_bounded(kind, embedding):
    ghn = small_ghn(CONFIGS[kind])
    values = decode_one(ghn, norm("n", 40), 100 * embedding)
    assert values["n.weight"].min() >= 0
    assert values["n.weight"].max() <= 2
    assert values["n.bias"].abs().max() <= 1


def test_vectors_repeat_the_decoder_s_two_rows(embedding):
    ghn = small_ghn()
    vectors = ghn.decoder.vectors
    rows = vectors.output(functional.relu(vectors.hidden(embedding))).view(2, 8)
    values = decode_one(ghn, norm("n", 11), embedding)
    torch.testing.assert_close(values["n.weight"], 2 * torch.sigmoid(rows[0] / 2).repeat(2)[:11])
    torch.testing.assert_close(values["n.bias"], torch.tanh(rows[1] / 5).repeat(2)[:11])
    torch.testing.assert_close(decode_one(ghn, bias("b", 5), embedding)["b"], torch.tanh(rows[1, :5] / 5))


def test_class_bias_is_mapped_from_the_bias_row(embedding):
    ghn = small_ghn()
    vectors = ghn.decoder.vectors
    row = vectors.output(functional.relu(vectors.hidden(embedding))).view(2, 8)[1]
    expected = torch.tanh(vectors.class_bias(functional.relu(row)) / 5)
    torch.testing.assert_close(decode_one(ghn, bias("b", 10, is_head=True), embedding)["b"], expected)


def full_grid(ghn: GraphHyperNetwork, embedding: Tensor) -> Tensor:
    """Everything the tiled decoder can say about an embedding, (Mo, Mi, Mh, Mw)."""
    decoder = ghn.decoder
    grid = functional.relu(decoder.grid(embedding)).view(-1, 5, 5).permute(1, 2, 0)
    return decoder.output(functional.relu(decoder.hidden(grid))).view(5, 5, 8, 8).permute(2, 3, 0, 1)


@pytest.mark.parametrize(
    ("kernel", "rows", "columns"),
    [
        ((1, 1), (2, 3), (2, 3)),
        ((2, 2), (1, 3), (1, 3)),
        ((3, 3), (1, 4), (1, 4)),
        ((1, 4), (2, 3), (0, 4)),
        ((5, 5), (0, 5), (0, 5)),
    ],
)
def test_kernels_take_the_middle_of_the_grid(kernel, rows, columns, embedding):
    ghn = small_ghn()
    found = decode_one(ghn, conv("w", 12, 5, *kernel), embedding)["w"]
    block = full_grid(ghn, embedding)[:, :5, slice(*rows), slice(*columns)]
    beta = 1 if kernel[0] < kernel[1] else 2
    expected = torch.cat((block, block))[:12] * math.sqrt(beta / (5 * math.prod(kernel)))
    torch.testing.assert_close(found, expected)


def test_ghn2_kernels_take_the_corner_of_the_grid(embedding):
    ghn = small_ghn(CONFIGS["ghn2"])
    found = decode_one(ghn, conv("w", 8, 8, 3, 2), embedding)["w"]
    torch.testing.assert_close(found, full_grid(ghn, embedding)[:, :, :3, :2] * math.sqrt(2 / 48))


def test_kernels_larger_than_the_grid_are_interpolated(embedding):
    ghn = small_ghn()
    found = decode_one(ghn, conv("w", 8, 3, 9, 9), embedding)["w"]
    expected = functional.interpolate(full_grid(ghn, embedding)[:, :3], (9, 9), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found, expected * math.sqrt(2 / 243))


@pytest.mark.parametrize("shape", [(10, 6), (10, 6, 1, 1), (4, 6), (13, 11)], ids=str)
def test_class_layer_maps_channels_to_classes(shape, embedding):
    ghn = small_ghn()
    channels = functional.relu(full_grid(ghn, embedding)[:, :, 2, 2])  # (Mo, Mi)
    classes = ghn.decoder.class_output(channels.T).T  # (K, Mi)
    rows, columns = torch.arange(shape[0]) % 10, torch.arange(shape[1]) % min(shape[1], 8)
    expected = (classes[rows][:, columns] * math.sqrt(2 / shape[1])).view(shape)
    torch.testing.assert_close(decode_one(ghn, conv("w", *shape, is_head=True), embedding)["w"], expected)


def test_position_embedding_is_the_grid_after_a_drawn_row(embedding):
    ghn = small_ghn()
    found = decode_one(ghn, conv("p", 1, 10, 11, op_type="pos_enc"), embedding)["p"]
    grid = full_grid(ghn, embedding)[0, :, 1:4, 1:4].flatten(1).T  # (9, Mi)
    scale = math.sqrt(2 / 110) if found.shape[2] >= 99 else 1
    torch.testing.assert_close(found[0, 1:], torch.cat((grid, grid), dim=1)[:, :11] * scale)
    assert 0 < found[0, 0].abs().max() < 0.1


def test_the_drawn_row_depends_on_the_seed_only(embedding):
    ghn = small_ghn()
    node = conv("p", 1, 10, 16, op_type="pos_enc")
    first, again, other = (decode_one(ghn, node, embedding, seed=seed)["p"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first[0, 0], other[0, 0])
    assert torch.equal(first[0, 1:], other[0, 1:])


def test_low_rank_weights_have_the_rank_and_no_copies(embedding):
    ghn = small_ghn(CONFIGS["logah"])
    weight = decode_one(ghn, conv("w", 32, 24), embedding)["w"]
    singular = torch.linalg.svdvals(weight.double())
    assert (singular > 1e-6 * singular[0]).sum() == ghn.config.rank
    assert len(torch.unique(weight, dim=0)) == 32


def test_low_rank_kernel_is_the_product_of_its_factors(embedding):
    ghn = small_ghn(CONFIGS["logah"])
    decoder, rank = ghn.decoder, ghn.config.rank
    hidden = functional.relu(decoder.hidden(functional.relu(decoder.expand(embedding))))
    features = functional.relu(decoder.factors(hidden)).view(2, rank, rank)
    left = decoder.out_output(features[0]).view(rank, 32, 5)[:, :6, 1:4]
    right = decoder.in_output(features[1]).view(rank, 32, 5)[:, :9, 2:3]
    expected = torch.einsum("roy,rix->oiyx", left, right) / math.sqrt(rank) * math.sqrt(2 / 27)
    torch.testing.assert_close(decode_one(ghn, conv("w", 6, 9, 3, 1), embedding)["w"], expected)
