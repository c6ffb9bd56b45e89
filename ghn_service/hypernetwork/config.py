"""``GHNConfig``: everything that fixes the shape of a graph hypernetwork.

Published sizes (hidden channels = widest decoded block for GHN-3): GHN-3 T 64, S 128, L 256, XL 384 with 3, 5, 12, 24
layers (arXiv:2303.04143, table 1); GHN-2 32 with blocks of 64 (arXiv:2110.13100, section 4).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ghn_service.errors import CheckpointError
from ghn_service.graph.op_types import OP_TYPE_NAMES

_NAMES = {
    "encoder": ("gated_gnn", "graphormer"),
    "decoder": ("tiled", "low_rank"),
    "kernel_crop": ("corner", "center"),
    "decoder_activation": ("relu", "leaky_relu"),
}
_LARGEST = {
    "hidden_channels": 8192,
    "num_layers": 256,
    "num_heads": 256,
    "num_classes": 1_000_000,
    "distance_cutoff": 253,
    "rank": 4096,
}


@dataclass(frozen=True, slots=True)
class GHNConfig:
    """Sizes and choices of one graph hypernetwork.

    Attributes:
        encoder: ``graphormer`` (GHN-3) or ``gated_gnn`` (GHN-2).
        decoder: ``tiled`` (GHN-2 and GHN-3: a block, repeated) or ``low_rank`` (LoGAH: two factors, no repetition).
        hidden_channels: Width C of node embeddings; a multiple of 4 and of ``num_heads``.
        num_layers: Layers of the Graphormer; without meaning for the gated GNN.
        num_heads: Attention heads of the Graphormer; without meaning for the gated GNN.
        max_shape: Largest block that is decoded: (out channels, in channels, kernel height, kernel width).
        num_classes: Classes that the decoders of the classifier predict.
        weight_norm: Whether decoded values are scaled by fan-in (``weight_scale``).
        layer_norm: Whether node embeddings pass a last layer normalisation.
        distance_cutoff: Longest path that becomes a virtual edge; 1 means no virtual edges.
        kernel_crop: Which part of the decoded kernel grid a smaller kernel takes: ``center`` (GHN-3) or ``corner``
            (GHN-2).
        decoder_activation: ``relu`` (GHN-2 and GHN-3), or ``leaky_relu``, whose units cannot stop learning for good
            (``docs/training.md``, *What paid*).
        rank: Rank of the factors of the low-rank decoder; without meaning for the tiled one.
        places: Whether a node's features say where in the network it is (``places.py``); no published checkpoint's do.
        op_types: Vocabulary of node types; the position is the row of the type embedding.

    Raises:
        CheckpointError: A value is impossible.
    """

    encoder: str = "graphormer"
    decoder: str = "tiled"
    hidden_channels: int = 64
    num_layers: int = 3
    num_heads: int = 8
    max_shape: tuple[int, int, int, int] = (64, 64, 16, 16)
    num_classes: int = 1000
    weight_norm: bool = True
    layer_norm: bool = True
    distance_cutoff: int = 50
    kernel_crop: str = "center"
    decoder_activation: str = "relu"
    rank: int = 32
    places: bool = False
    op_types: tuple[str, ...] = OP_TYPE_NAMES

    def __post_init__(self) -> None:
        for field, known in _NAMES.items():
            if getattr(self, field) not in known:
                raise CheckpointError(f"{field} must be one of {', '.join(known)}; got {getattr(self, field)!r}")
        for field, largest in _LARGEST.items():
            _check_size(field, getattr(self, field), largest)
        if not isinstance(self.places, bool):
            raise CheckpointError(f"places must be true or false; got {self.places!r}")
        if len(self.max_shape) != 4:
            raise CheckpointError(f"max_shape must have 4 sizes; got {self.max_shape}")
        for size in self.max_shape[:2]:
            _check_size("max_shape", size, 65536)
        for size in self.max_shape[2:]:
            _check_size("max_shape", size, 256)
        if self.hidden_channels % 4 or (self.encoder == "graphormer" and self.hidden_channels % self.num_heads):
            raise CheckpointError(
                f"hidden_channels must be a multiple of 4 and of num_heads; got {self.hidden_channels} channels and "
                f"{self.num_heads} heads"
            )
        if "input" not in self.op_types or len(set(self.op_types)) != len(self.op_types):
            raise CheckpointError("op_types must name each type once and contain 'input'")

    @property
    def kind(self) -> str:
        """Name of the family: ``ghn2``, ``ghn3``, or ``logah`` (a GHN-3 with the low-rank decoder)."""
        if self.decoder == "low_rank":
            return "logah"
        return "ghn2" if self.encoder == "gated_gnn" else "ghn3"


def _check_size(field: str, value: object, largest: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest:
        raise CheckpointError(f"{field} must be a whole number from 1 to {largest}; got {value!r}")


def encode_config(config: GHNConfig) -> dict[str, Any]:
    """The configuration as values for JSON; ``decode_config`` reads them back."""
    values = dataclasses.asdict(config)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def decode_config(values: Mapping[str, Any]) -> GHNConfig:
    """The configuration that ``encode_config`` wrote.

    Raises:
        CheckpointError: A key is unknown, or a value is impossible.
    """
    if not isinstance(values, Mapping):
        raise CheckpointError(f"a hypernetwork configuration must be a mapping; got {type(values).__name__}")
    known = {field.name for field in dataclasses.fields(GHNConfig)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise CheckpointError(
            f"unknown configuration keys {', '.join(map(repr, unknown[:5]))}; this checkpoint may be from a newer "
            "version of ghn-service"
        )
    arguments: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
    }
    try:
        return GHNConfig(**arguments)
    except TypeError as error:
        raise CheckpointError(f"a value of the hypernetwork configuration has the wrong type: {error}") from error
