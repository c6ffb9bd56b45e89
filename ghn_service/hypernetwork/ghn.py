"""``GraphHyperNetwork``: a network that maps the graph of an architecture to weights for it.

Node features are refined by an encoder that knows the graph, and each parameter's weights are decoded from its node:
``features -> NodeEncoder -> Graphormer | GatedGNN -> layer norm -> decoder -> tile -> tensors by name``.
It never touches the target network. Dtype and device follow its parameters and the batch.
Legend: T nodes of all graphs of a batch, C hidden channels.

References: GHN-2, Knyazev et al. 2021 (arXiv:2110.13100); GHN-3, Knyazev et al. 2023 (arXiv:2303.04143).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from ghn_service.hypernetwork.config import GHNConfig
from ghn_service.hypernetwork.decoders import DECODERS, Request
from ghn_service.hypernetwork.features import GraphBatch, Target, shape_vocabulary
from ghn_service.hypernetwork.gated_gnn import GatedGNN
from ghn_service.hypernetwork.graphormer import Graphormer
from ghn_service.hypernetwork.initialization import initialize_parameters
from ghn_service.hypernetwork.places import PLACE_CHANNELS, encode_places
from ghn_service.hypernetwork.tiling import tile_to_shape

__all__ = ["ENCODERS", "GHNConfig", "GraphHyperNetwork"]

ENCODERS: dict[str, type[Graphormer] | type[GatedGNN]] = {"graphormer": Graphormer, "gated_gnn": GatedGNN}


class NodeEncoder(nn.Module):
    """First features of a node: its type, plus the four sizes of its shape side by side, plus a map of its place.

    Reference: Knyazev et al. 2021 (arXiv:2110.13100), section 4.1 and appendix A.

    Args:
        config: Sizes; the two shape tables have a last row for nodes without a shape.
    """

    def __init__(self, config: GHNConfig) -> None:
        super().__init__()
        vocabulary = shape_vocabulary(config.num_classes, config.max_shape[3])
        part = config.hidden_channels // 4
        self.type_embedding = nn.Embedding(len(config.op_types), config.hidden_channels)
        self.channel_embedding = nn.Embedding(len(vocabulary.channels) + 1, part)
        self.spatial_embedding = nn.Embedding(len(vocabulary.spatial) + 1, part)
        self.place = nn.Linear(PLACE_CHANNELS, config.hidden_channels) if config.places else None

    def forward(self, type_row: Tensor, shape_rows: Tensor, places: Tensor) -> Tensor:
        """Encodes nodes.

        Args:
            type_row: Rows of the type embedding, (T,).
            shape_rows: Rows for (out channels, in channels, height, width), (T, 4).
            places: Where nodes are, (T, 7); not read by a hypernetwork without places.

        Returns:
            Node features, (T, C).
        """
        channels = self.channel_embedding(shape_rows[:, :2]).flatten(1)  # (T, 2, C/4) -> (T, C/2)
        spatial = self.spatial_embedding(shape_rows[:, 2:]).flatten(1)
        features: Tensor = self.type_embedding(type_row) + torch.cat((channels, spatial), dim=1)
        if self.place is not None:
            features = features + self.place(encode_places(places).to(features.dtype))
        return features


class GraphHyperNetwork(nn.Module):
    """A graph hypernetwork of any supported kind and size.

    Args:
        config: Sizes and choices.
        generator: Source of the initial values; None for torch's global one.
    """

    def __init__(self, config: GHNConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.node_encoder = NodeEncoder(config)
        self.encoder = ENCODERS[config.encoder](config)
        self.output_norm = nn.LayerNorm(config.hidden_channels) if config.layer_norm else nn.Identity()
        self.decoder = DECODERS[config.decoder](config)
        initialize_parameters(self, generator)
        self.decoder.scale_first_predictions()

    @property
    def num_parameters(self) -> int:
        """Number of scalars in the hypernetwork."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def device(self) -> torch.device:
        """Where the hypernetwork is."""
        return self.node_encoder.type_embedding.weight.device

    def encode(self, batch: GraphBatch) -> Tensor:
        """Embeds every node of a batch.

        Args:
            batch: The graphs, on the hypernetwork's device.

        Returns:
            Node embeddings, (T, C).
        """
        features = self.node_encoder(batch.data.type_row, batch.data.shape_rows, batch.data.places)
        embeddings: Tensor = self.output_norm(self.encoder(features, batch))
        return embeddings

    def decode(self, embeddings: Tensor, batch: GraphBatch, *, seed: int = 0) -> list[dict[str, Tensor]]:
        """Decodes all tensors of all graphs, differentiably.

        Args:
            embeddings: Node embeddings, (T, C).
            batch: The graphs they belong to.
            seed: Seeds the rows of position embeddings that are drawn (class tokens).

        Returns:
            Per graph: parameter name -> tensor in torch's layout, in the order of the graph's parameters. Tensors may
            be views of common memory.
        """
        requests = [
            [Request(target, first + target.node) for target in targets]
            for first, targets in zip(batch.data.ptr[:-1].tolist(), batch.targets, strict=True)
        ]
        tensors: dict[Request, Tensor] = {}
        for group in self.decoder(embeddings, list(chain(*requests)), seed=seed, max_elements=None):
            stacked = tile_to_shape(group.blocks, group.requests[0].target.shape)
            tensors.update(zip(group.requests, stacked.unbind(), strict=True))
        return [{request.target.name: tensors[request] for request in wanted} for wanted in requests]

    @torch.no_grad()
    def decode_blocks(
        self, embeddings: Tensor, targets: Sequence[Target], *, seed: int = 0, max_elements: int | None = None
    ) -> Iterator[tuple[list[Target], Tensor]]:
        """Decodes some tensors of a single graph without repeating blocks to the tensors' sizes.

        Args:
            embeddings: Node embeddings of the graph, (N, C).
            targets: What to decode.
            seed: Seeds the rows of position embeddings that are drawn.
            max_elements: Number of values that may be held at once, as far as single tensors allow.

        Yields:
            Targets of one shape and their scaled blocks, (P, *block): with the targets' axes, each as long as the
            targets' or shorter.
        """
        requests = [Request(target, target.node) for target in targets]
        for group in self.decoder(embeddings, requests, seed=seed, max_elements=max_elements):
            yield [request.target for request in group.requests], group.blocks

    def forward(self, batch: GraphBatch, *, seed: int = 0) -> list[dict[str, Tensor]]:
        """Predicts all tensors of all graphs; see ``encode`` and ``decode``."""
        return self.decode(self.encode(batch), batch, seed=seed)
