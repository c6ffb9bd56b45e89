"""First features of a node: its type, the shape of its tensor and, where wanted, its place in the network.

Reference: Knyazev et al. 2021 (arXiv:2110.13100), section 4.1 and appendix A.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ghn_service.hypernetwork.config import GHNConfig
from ghn_service.hypernetwork.features import shape_vocabulary
from ghn_service.hypernetwork.places import PLACE_CHANNELS, encode_places


class NodeEncoder(nn.Module):
    """Type embedding, plus the embeddings of the four sizes of a shape side by side, plus a linear map of the place.

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
