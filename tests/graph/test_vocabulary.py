from __future__ import annotations

import networkx
import pytest

from ghn_service.graph.op_types import OP_TYPE_NAMES
from ghn_service.graph.passes import restrict_vocabulary
from tests.graph_comparison import as_networkx
from tests.hypernetwork.small_graphs import random_network, small_network


def test_a_full_vocabulary_changes_nothing():
    graph = small_network()
    assert restrict_vocabulary(graph, OP_TYPE_NAMES) is graph


@pytest.mark.parametrize("seed", range(5))
def test_contraction_keeps_who_reaches_whom(seed):
    graph = random_network(seed)
    restricted = restrict_vocabulary(graph, ("input", "conv"))
    kept = [index for index, node in enumerate(graph.nodes) if node.op_type in ("input", "conv")]
    assert [graph.nodes[index] for index in kept] == list(restricted.nodes)
    before = networkx.transitive_closure(as_networkx(graph)).subgraph(kept)
    after = networkx.transitive_closure(as_networkx(restricted))
    place = {old: new for new, old in enumerate(kept)}
    assert {(place[source], place[target]) for source, target in before.edges} == set(after.edges)


def test_edges_join_all_neighbours_of_a_contracted_node():
    names = [name for name in OP_TYPE_NAMES if name != "sum"]
    graph = restrict_vocabulary(small_network(), names)
    # stem_norm and depthwise_bias met in a sum before row.
    index = {node.name: position for position, node in enumerate(graph.nodes)}
    assert {(index["stem_norm"], index["row"]), (index["depthwise_bias"], index["row"])} <= set(graph.edges)


def test_no_tensor_is_lost_and_the_user_is_told():
    graph = small_network()
    restricted = restrict_vocabulary(graph, ("input", "conv"))
    assert {spec.name for spec in restricted.parameters()} == {spec.name for spec in graph.parameters()}
    assert "pos_enc" in restricted.warnings[-1]
