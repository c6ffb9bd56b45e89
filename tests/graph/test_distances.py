"""Distances equal those of a breadth-first search."""

from __future__ import annotations

import networkx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ghn_service.graph.architecture import ArchitectureGraph, Node, shortest_distances
from tests.graph_comparison import as_networkx


def chain(length: int) -> ArchitectureGraph:
    nodes = (Node("input"), *(Node("sum") for _ in range(length - 1)))
    return ArchitectureGraph(nodes, tuple((index, index + 1) for index in range(length - 1)))


@st.composite
def random_graphs(draw: st.DrawFn) -> ArchitectureGraph:
    size = draw(st.integers(1, 40))
    pairs = [(source, target) for target in range(size) for source in range(target)]
    edges = draw(st.lists(st.sampled_from(pairs), unique=True, max_size=80)) if pairs else []
    return ArchitectureGraph((Node("input"), *(Node("sum") for _ in range(size - 1))), tuple(sorted(edges)))


@settings(max_examples=50, deadline=None)
@given(random_graphs(), st.integers(1, 50))
def test_distances_are_those_of_breadth_first_search(graph: ArchitectureGraph, cutoff: int) -> None:
    expected = np.zeros((graph.num_nodes, graph.num_nodes), dtype=np.uint8)
    for source, lengths in networkx.all_pairs_shortest_path_length(as_networkx(graph), cutoff=cutoff):
        for target, length in lengths.items():
            expected[source, target] = length
    assert np.array_equal(shortest_distances(graph, cutoff=cutoff), expected)


def test_distances_beyond_the_cutoff_are_absent() -> None:
    row = shortest_distances(chain(60))[0]
    assert row.tolist() == [*range(51), *[0] * 9]


@pytest.mark.parametrize("cutoff", [0, 254])
def test_impossible_cutoffs_are_refused(cutoff: int) -> None:
    with pytest.raises(ValueError):
        shortest_distances(chain(3), cutoff=cutoff)
