"""``GraphHyperNetwork``: a network that maps the graph of an architecture to weights for it.

Node features are refined by an encoder that knows the graph, and each parameter's weights are decoded from its node:
``features -> NodeEncoder -> Graphormer | GatedGNN -> layer norm -> decoder -> tile -> tensors by name``.
It never touches the target network. Dtype and device follow its parameters and the batch.
Legend: T nodes of all graphs of a batch, C hidden channels.

References: GHN-2, Knyazev et al. 2021 (arXiv:2110.13100); GHN-3, Knyazev et al. 2023 (arXiv:2303.04143).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ghn_service.hypernetwork.blocks import Request
from ghn_service.hypernetwork.config import GHNConfig
from ghn_service.hypernetwork.decoders import DECODERS
from ghn_service.hypernetwork.features import GraphBatch, Target
from ghn_service.hypernetwork.gated_gnn import GatedGNN
from ghn_service.hypernetwork.graphormer import Graphormer
from ghn_service.hypernetwork.initialization import initialize_parameters
from ghn_service.hypernetwork.node_encoder import NodeEncoder
from ghn_service.hypernetwork.tiling import tile_to_shape

__all__ = ["ENCODERS", "GHNConfig", "GraphHyperNetwork"]

ENCODERS: dict[str, type[Graphormer] | type[GatedGNN]] = {"graphormer": Graphormer, "gated_gnn": GatedGNN}


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
        requests = _requests(batch)
        tensors: dict[int, Tensor] = {}
        for group in self.decoder(embeddings, requests, seed=seed, max_elements=None):
            stacked = tile_to_shape(group.blocks, requests[group.indices[0]].target.shape)
            tensors.update(zip(group.indices, stacked.unbind(), strict=True))
        ordered = iter(range(len(requests)))
        return [{target.name: tensors[next(ordered)] for target in targets} for targets in batch.targets]

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
            yield [targets[index] for index in group.indices], group.blocks

    def forward(self, batch: GraphBatch, *, seed: int = 0) -> list[dict[str, Tensor]]:
        """Predicts all tensors of all graphs; see ``encode`` and ``decode``."""
        return self.decode(self.encode(batch), batch, seed=seed)


def _requests(batch: GraphBatch) -> list[Request]:
    """The targets of all graphs, with the rows of their nodes among all T."""
    return [
        Request(target, first + target.node)
        for first, targets in zip(batch.first_nodes, batch.targets, strict=True)
        for target in targets
    ]
