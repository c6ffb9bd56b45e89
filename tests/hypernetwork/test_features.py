from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ghn_service.errors import UnsupportedArchitectureError
from ghn_service.graph.architecture import Node, ParameterSpec
from ghn_service.hypernetwork.features import Role, build_features, collate, is_tiled, shape_vocabulary
from tests.hypernetwork.small_graphs import SMALL, chain, conv, norm, random_network, small_network

PUBLISHED = shape_vocabulary(1000, 16)
SMALL_PUBLISHED = shape_vocabulary(10, 11)


def rows_of(size, vocabulary=PUBLISHED):
    return vocabulary.rows(Node("conv", weight=ParameterSpec("weight", (size,) * 4)))


def test_published_vocabularies_have_the_published_sizes():
    assert (len(PUBLISHED.channels), len(PUBLISHED.spatial)) == (391, 10)
    assert (len(SMALL_PUBLISHED.channels), len(SMALL_PUBLISHED.spatial)) == (391, 8)


@pytest.mark.parametrize(
    ("size", "known"),
    [
        (1, 1),
        (2, 1),
        (3, 3),
        (4, 8),
        (7, 8),
        (9, 8),
        (12, 8),
        (72, 64),
        (88, 80),
        (1000, 1000),
        (4111, 4096),
        (9999, 8192),
    ],
)
def test_unknown_channel_counts_take_the_nearest_known_one(size, known):
    assert PUBLISHED.channels[rows_of(size)[0]] == known


def test_the_class_count_is_a_known_channel_count():
    assert SMALL_PUBLISHED.channels[rows_of(12, SMALL_PUBLISHED)[0]] == 10


@pytest.mark.parametrize(
    ("size", "known"), [(1, 1), (2, 3), (4, 3), (6, 5), (8, 7), (10, 9), (12, 11), (16, 16), (32, 16)]
)
def test_unknown_kernel_sizes_take_the_nearest_known_one(size, known):
    assert PUBLISHED.spatial[rows_of(size)[2]] == known


@given(st.integers(8, 20_000))
def test_no_known_size_is_nearer(size):
    chosen = PUBLISHED.channels[rows_of(size)[0]]
    best = min(abs(size - known) for known in PUBLISHED.channels)
    assert abs(size - chosen) == best
    assert all(abs(size - known) > best for known in PUBLISHED.channels if known < chosen)


def sizes_of(node: Node) -> list[int | None]:
    rows = PUBLISHED.rows(node)
    tables = [PUBLISHED.channels, PUBLISHED.channels, PUBLISHED.spatial, PUBLISHED.spatial]
    return [None if row == len(table) else table[row] for row, table in zip(rows, tables, strict=True)]


@pytest.mark.parametrize(
    ("node", "sizes"),
    [
        (Node("sum"), [None] * 4),
        (Node("glob_avg"), [None] * 4),
        (Node("max_pool", kernel_shape=(2, 5)), [1, 1, 3, 5]),
        (Node("avg_pool"), [1, 1, 3, 3]),
        (conv("w", 64, 32), [64, 32, 1, 1]),
        (conv("w", 64, 32, 3, 7), [64, 32, 3, 7]),
        (norm("n", 64), [64, 1, 1, 1]),
        (conv("p", 1, 197, 768, op_type="pos_enc"), [1, 768, 14, 14]),
    ],
    ids=str,
)
def test_shape_of_a_node(node, sizes):
    assert sizes_of(node) == sizes


def test_stored_layout_does_not_change_features():
    plain = chain(conv("w", 48, 16))
    stored = chain(Node("conv", "w", weight=ParameterSpec("w", (16, 48), permutation=(1, 0))))
    first, second = build_features(plain, SMALL), build_features(stored, SMALL)
    assert torch.equal(first.shape_rows, second.shape_rows)
    assert [*map(dataclasses.astuple, first.targets)] == [*map(dataclasses.astuple, second.targets)]


def test_generation_is_the_longest_path():
    features = build_features(small_network(), SMALL)
    assert features.generation.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 9, 10, 11, 12]


def test_roles_of_all_targets():
    roles = {target.name: target.role for target in build_features(small_network(), SMALL).targets}
    assert roles == {
        "stem": Role.MATRIX,
        "stem_norm.weight": Role.VECTOR,
        "stem_norm.bias": Role.BIAS,
        "depthwise": Role.MATRIX,
        "depthwise_bias": Role.BIAS,
        "row": Role.MATRIX,
        "row_norm.weight": Role.VECTOR,
        "row_norm.bias": Role.BIAS,
        "positions": Role.POSITION,
        "head.weight": Role.CLASS_MATRIX,
        "head.bias": Role.CLASS_BIAS,
    }


@pytest.mark.parametrize("shape", [(4, 4, 3, 3, 3), (7,), ()], ids=str)
def test_tensors_of_other_ranks_are_no_targets(shape):
    assert build_features(chain(conv("w", *shape)), SMALL).targets == ()


def test_norms_over_several_axes_are_no_targets():
    assert build_features(chain(conv("w", 8, 7, 7, op_type="ln")), SMALL).targets == ()


@pytest.mark.parametrize(
    ("node", "tiled"),
    [
        (conv("w", 8, 8, 9, 9), False),
        (conv("w", 9, 8, 1, 1), True),
        (conv("w", 8, 9), True),
        (conv("w", 10, 8, is_head=True), False),
        (conv("w", 11, 8, is_head=True), True),
        (conv("p", 1, 99, 8, op_type="pos_enc"), False),
        (conv("p", 1, 99, 9, op_type="pos_enc"), True),
    ],
    ids=str,
)
def test_tensors_larger_than_blocks_are_tiled(node, tiled):
    (target,) = build_features(chain(node), SMALL).targets
    assert is_tiled(target, SMALL) == tiled


@pytest.mark.parametrize(("tokens", "side"), [(196, 14), (197, 14), (198, 14), (201, 14), (202, 15), (77, 9)])
def test_grid_of_a_position_embedding_leaves_room_for_a_few_tokens(tokens, side):
    (target,) = build_features(chain(conv("p", 1, tokens, 8, op_type="pos_enc")), SMALL).targets
    assert target.kernel == (side, side)


def test_types_outside_the_vocabulary_are_refused():
    config = dataclasses.replace(SMALL, op_types=("input", "conv"))
    with pytest.raises(UnsupportedArchitectureError):
        build_features(small_network(), config)


def test_collate_keeps_graphs_apart():
    items = [build_features(random_network(seed, size), SMALL) for seed, size in ((1, 5), (2, 9))]
    batch = collate(items)
    assert batch.data.ptr.tolist() == [0, 5, 14]
    assert batch.distances.shape == (2, 9, 9)
    assert torch.equal(batch.distances[0, :5, :5], items[0].distances)
    assert batch.distances[0, 5:].sum() == 0
    assert torch.equal(batch.data.edge_index[:, items[0].edge_index.shape[1] :] - 5, items[1].edge_index)
