"""``GraphHyperNetwork``: a network that maps the graph of an architecture to weights for it.

Node features are refined by an encoder that knows the graph, and each parameter's weights are decoded from its node:
``features -> NodeEncoder -> Graphormer | GatedGNN -> layer norm -> decoder -> tile -> tensors by name``.
It never touches the target network. Dtype and device follow its parameters and the batch.
Legend: T nodes of all graphs of a batch, C hidden channels.

References: GHN-2, Knyazev et al. 2021 (arXiv:2110.13100); GHN-3, Knyazev et al. 2023 (arXiv:2303.04143).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ghn_service.hypernetwork.config import GHNConfig
from ghn_service.hypernetwork.decoders import DECODERS, DecodedGroup
from ghn_service.hypernetwork.features import GraphBatch, Target, shape_vocabulary
from ghn_service.hypernetwork.gated_gnn import GatedGNN
from ghn_service.hypernetwork.graphormer import DistanceBias, Graphormer
from ghn_service.hypernetwork.places import PLACE_CHANNELS, encode_places
from ghn_service.hypernetwork.tiling import tile_to_shape

ENCODERS: dict[str, type[Graphormer] | type[GatedGNN]] = {"graphormer": Graphormer, "gated_gnn": GatedGNN}


class NodeEncoder(nn.Module):
    """First features of a node: its type, plus the four sizes of its shape side by side, plus a map of its place.

    The two shape tables have a last row for nodes without a shape.
    Reference: Knyazev et al. 2021 (arXiv:2110.13100), section 4.1 and appendix A.
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
        """Node features (T, C) from (T,), (T, 4) and (T, 7) of ``GraphFeatures``."""
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
        _initialize_parameters(self, generator)
        self.decoder.scale_first_predictions()

    @property
    def num_parameters(self) -> int:
        """Number of scalars in the hypernetwork."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def device(self) -> torch.device:
        """Where the hypernetwork is."""
        return self.node_encoder.type_embedding.weight.device

    def decode_matrices_in(self, dtype: torch.dtype) -> None:
        """Keeps the decoder of matrices, which is nearly all of a large hypernetwork, and its products in this type.

        Encoder and vectors stay in float32: they cost little, and errors of the one would reach every tensor.
        """
        for part in self.decoder.children():
            if part is not self.decoder.vectors:
                part.to(dtype)

    def encode(self, batch: GraphBatch) -> Tensor:
        """Node embeddings (T, C) of a batch that is on the hypernetwork's device."""
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
        graphs = [
            [Target(item.name, item.shape, item.role, first + item.node, item.draw) for item in targets]
            for first, targets in zip(batch.data.ptr[:-1].tolist(), batch.targets, strict=True)
        ]
        tensors: dict[Target, Tensor] = {}
        for members, blocks in self.decoder(
            embeddings, [target for targets in graphs for target in targets], seed=seed
        ):
            tensors.update(zip(members, tile_to_shape(blocks, members[0].shape).unbind(), strict=True))
        return [{target.name: tensors[target] for target in targets} for targets in graphs]

    @torch.no_grad()
    def decode_blocks(
        self, embeddings: Tensor, targets: Sequence[Target], *, seed: int = 0, max_elements: int | None = None
    ) -> Iterator[DecodedGroup]:
        """Decodes some tensors of a single graph without repeating blocks to the tensors' sizes.

        Args:
            embeddings: Node embeddings of the graph, (N, C).
            targets: What to decode.
            seed: Seeds the rows of position embeddings that are drawn.
            max_elements: Number of values that may be held at once, as far as single tensors allow.
        """
        yield from self.decoder(embeddings, targets, seed=seed, max_elements=max_elements)

    def forward(self, batch: GraphBatch, *, seed: int = 0) -> list[dict[str, Tensor]]:
        """Predicts all tensors of all graphs; see ``encode`` and ``decode``."""
        return self.decode(self.encode(batch), batch, seed=seed)


@torch.no_grad()
def _initialize_parameters(module: nn.Module, generator: torch.Generator | None) -> None:
    """Draws every linear, recurrent and embedding layer of ``module`` anew; None is torch's global generator.

    Embeddings are normal with standard deviation ``C ** -0.5``, distances sinusoidal as in the original transformer.
    Reference: Knyazev et al. 2023 (arXiv:2303.04143), appendix B.
    """
    for child in module.modules():
        if isinstance(child, nn.Linear | nn.GRUCell):
            fan = child.hidden_size if isinstance(child, nn.GRUCell) else child.in_features
            for parameter in child.parameters(recurse=False):
                parameter.uniform_(-1 / math.sqrt(fan), 1 / math.sqrt(fan), generator=generator)
        elif isinstance(child, nn.Embedding):
            std = child.embedding_dim**-0.5
            nn.init.trunc_normal_(child.weight, std=std, a=-2.0, b=2.0, generator=generator)
    for child in module.modules():
        if isinstance(child, DistanceBias):
            table = child.distance_embedding.weight
            num_rows, channels = table.shape
            frequencies = torch.exp(torch.arange(0, channels, 2) * (-math.log(10_000.0) / channels))
            angles = torch.arange(num_rows)[:, None] * frequencies
            table.copy_(torch.stack((angles.sin(), angles.cos()), dim=2).flatten(1)[:, :channels])
