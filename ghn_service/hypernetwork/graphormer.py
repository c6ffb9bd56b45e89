"""The encoder of GHN-3: a transformer over all nodes whose attention knows the distances between them.

Every pair of nodes attends; a learned bias per head depends on the shortest path lengths in both directions. On an
acyclic graph at most one direction has a path, so the bias is a table over signed distances, looked up per pair.
Legend: B graphs, S nodes of the largest, T nodes of all, C channels, H heads, D distance cutoff.

Reference: Knyazev et al. 2023 (arXiv:2303.04143), section 3; Ying et al. 2021 (arXiv:2106.05234).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch_geometric.utils import degree, to_dense_batch

from ghn_service.hypernetwork.config import GHNConfig
from ghn_service.hypernetwork.features import GraphBatch

MAX_DEGREE = 100
MAX_INPUT_DISTANCE = 1000
DISTANCE_ROWS = 257
FIRST_DISTANCE_ROW = 2
MASKED_LOGIT = -(2.0**15)


class Graphormer(nn.Module):
    """Centrality and input distance, then pre-norm transformer layers with one shared distance bias."""

    def __init__(self, config: GHNConfig) -> None:
        super().__init__()
        channels = config.hidden_channels
        self.in_degree_embedding = nn.Embedding(MAX_DEGREE + 1, channels)
        self.out_degree_embedding = nn.Embedding(MAX_DEGREE + 1, channels)
        self.input_distance_embedding = nn.Embedding(MAX_INPUT_DISTANCE + 1, channels)
        self.distance_bias = DistanceBias(channels, config.num_heads, config.distance_cutoff)
        self.layers = nn.ModuleList(GraphormerLayer(channels, config.num_heads) for _ in range(config.num_layers))

    def forward(self, features: Tensor, batch: GraphBatch) -> Tensor:
        """Node embeddings (T, C) from node features (T, C)."""
        num_nodes = len(features)
        source, target = batch.data.edge_index
        in_degree = degree(target, num_nodes, dtype=torch.int64).clamp(max=MAX_DEGREE)
        out_degree = degree(source, num_nodes, dtype=torch.int64).clamp(max=MAX_DEGREE)
        nodes_per_graph = batch.data.ptr.diff()
        present = torch.arange(batch.distances.shape[1], device=source.device) < nodes_per_graph[:, None]  # (B, S)
        input_distance = batch.distances[:, 0, :][present].long().clamp(max=MAX_INPUT_DISTANCE)
        features = features + (
            self.in_degree_embedding(in_degree)
            + self.out_degree_embedding(out_degree)
            + self.input_distance_embedding(input_distance)
        )
        dense, valid = to_dense_batch(features, batch.data.batch, batch_size=len(batch.targets))  # (B, S, C), (B, S)
        bias = self.distance_bias(batch.distances)  # (B, H, S, S)
        if len(batch.targets) > 1:
            bias = bias.masked_fill(~valid[:, None, None, :], MASKED_LOGIT)
        for layer in self.layers:
            dense = layer(dense, bias)
        embeddings: Tensor = dense[valid]
        return embeddings


class DistanceBias(nn.Module):
    """Attention bias of a pair of nodes, from the path lengths there and back."""

    def __init__(self, channels: int, num_heads: int, cutoff: int) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.distance_embedding = nn.Embedding(DISTANCE_ROWS, channels)
        self.hidden = nn.Linear(2 * channels, channels)
        self.heads = nn.Linear(channels, num_heads)

    def forward(self, distances: Tensor) -> Tensor:
        """Bias per head (B, H, S, S) from the path lengths (B, S, S) of acyclic graphs."""
        # One row for every signed distance -D..D, positive where the path leads from row to column.
        signed = torch.arange(-self.cutoff, self.cutoff + 1, device=self.hidden.weight.device)
        pairs = torch.stack((signed.clamp(min=0), (-signed).clamp(min=0)), dim=1) + FIRST_DISTANCE_ROW
        embedded = self.distance_embedding(pairs).flatten(1)  # (2D + 1, 2, C) -> (2D + 1, 2C)
        table = self.heads(functional.relu(self.hidden(embedded)))  # (2D + 1, H)
        lengths = distances.to(torch.int32)
        rows = lengths - lengths.transpose(1, 2) + self.cutoff
        return functional.embedding(rows, table).permute(0, 3, 1, 2)


class GraphormerLayer(nn.Module):
    """Pre-norm self-attention with an additive bias, then a feed-forward block four times as wide."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(channels)
        self.query_key_value = nn.Linear(channels, 3 * channels, bias=False)
        self.attention_output = nn.Linear(channels, channels)
        self.feed_forward_norm = nn.LayerNorm(channels)
        self.expand = nn.Linear(channels, 4 * channels)
        self.contract = nn.Linear(4 * channels, channels)

    def forward(self, features: Tensor, bias: Tensor) -> Tensor:
        """Node features (B, S, C) from those before; ``bias`` (B, H, S, S) is added to the attention logits."""
        packed = self.query_key_value(self.attention_norm(features))
        packed = torch.unflatten(packed, -1, (3, self.num_heads, -1))  # (B, S, 3, H, C/H)
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind()  # each (B, H, S, C/H)
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        features = features + self.attention_output(attended.transpose(1, 2).flatten(2))
        hidden = functional.gelu(self.expand(self.feed_forward_norm(features)))
        updated: Tensor = features + self.contract(hidden)
        return updated
