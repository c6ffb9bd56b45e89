"""The encoder of GHN-2: one forward and one backward sweep over the graph, with a gated update per node.

By definition the sweep visits nodes one by one, in topological order, and each update is seen by all later ones. Nodes
of one generation (equal length of the longest path) have no path between them, so they are updated together here, for
all graphs of a batch at once; the result is the same.
Legend: T nodes of all graphs, sorted by generation, C channels.

Reference: Knyazev et al. 2021 (arXiv:2110.13100), equations 3 and 4.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from ghn_service.hypernetwork.config import GHNConfig
from ghn_service.hypernetwork.features import GraphBatch


def _message_function(channels: int, hidden_channels: int) -> nn.Sequential:
    """What a neighbour says: two linear layers, each followed by a ReLU."""
    return nn.Sequential(
        nn.Linear(channels, hidden_channels), nn.ReLU(), nn.Linear(hidden_channels, channels), nn.ReLU()
    )


class GatedGNN(nn.Module):
    r"""Gated message passing with virtual edges.

    .. math::
        m_v = \sum_{u: A_{uv} = 1} f(x_u) + \sum_{u: A_{uv} \ge 1} g(x_u) / A_{uv}, \qquad x_v = GRU(m_v, x_v)

    Direct neighbours count in both sums. The backward sweep does the same with the edges reversed. With a
    ``distance_cutoff`` of 1 there is no second sum.
    """

    def __init__(self, config: GHNConfig) -> None:
        super().__init__()
        channels = config.hidden_channels
        has_virtual_edges = config.distance_cutoff > 1
        self.direct_message = _message_function(channels, channels // 2 if has_virtual_edges else channels)
        self.virtual_message = _message_function(channels, channels // 2) if has_virtual_edges else None
        self.update = nn.GRUCell(channels, channels)

    def forward(self, features: Tensor, batch: GraphBatch) -> Tensor:
        """Node embeddings (T, C) from node features (T, C)."""
        generation, order = batch.data.generation.sort(stable=True)
        sizes: list[int] = torch.bincount(generation).tolist()
        weights = self._edge_weights(batch, order, features.dtype)
        features = self._sweep(features[order], [weight.t().contiguous() for weight in weights], sizes, forward=True)
        features = self._sweep(features, weights, sizes, forward=False)
        return features[order.argsort()]

    def _edge_weights(self, batch: GraphBatch, order: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """Weights of direct and of virtual edges from row to column, each (T, T), in generation order."""
        num_nodes = len(order)
        place = order.argsort()
        distances = torch.zeros(num_nodes, num_nodes, dtype=dtype, device=order.device)
        bounds = batch.data.ptr.tolist()
        for graph, (start, stop) in enumerate(itertools.pairwise(bounds)):
            rows = place[start:stop]
            distances[rows[:, None], rows] = batch.distances[graph, : stop - start, : stop - start].to(dtype)
        direct = (distances == 1).to(dtype)
        if self.virtual_message is None:
            return [direct]
        return [direct, torch.where(distances > 0, distances.reciprocal(), 0)]

    def _sweep(self, features: Tensor, weights: list[Tensor], sizes: list[int], *, forward: bool) -> Tensor:
        """Updates all generations in turn, from the first, listening to earlier ones, or from the last.

        There is one matrix (T, T) per message function: the weight of the message from column to row. ``sizes`` has
        the number of nodes of each generation.
        """
        functions = [function for function in (self.direct_message, self.virtual_message) if function is not None]
        # Messages are written in place; the products below do not save them for their gradient, as weights have none.
        messages = [torch.zeros_like(features) for _ in functions]
        updated: list[Tensor] = []
        stop = 0 if forward else len(features)
        for size in sizes if forward else reversed(sizes):
            start, stop = (stop, stop + size) if forward else (stop - size, stop)
            heard = slice(0, start) if forward else slice(stop, None)
            incoming = sum(
                weight[start:stop, heard] @ sent[heard] for weight, sent in zip(weights, messages, strict=True)
            )
            state = self.update(incoming, features[start:stop])
            for function, sent in zip(functions, messages, strict=True):
                sent[start:stop] = function(state)
            updated.append(state)
            stop = stop if forward else start
        return torch.cat(updated if forward else updated[::-1])
