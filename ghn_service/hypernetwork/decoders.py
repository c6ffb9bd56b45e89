"""The known decoders: what turns node embeddings into blocks of weights.

A new decoder is a class with this call and a line in ``DECODERS``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from torch import Tensor

from ghn_service.hypernetwork.blocks import DecodedGroup, Request
from ghn_service.hypernetwork.config import GHNConfig
from ghn_service.hypernetwork.low_rank_decoder import LowRankDecoder
from ghn_service.hypernetwork.tiled_decoder import TiledDecoder


class ParameterDecoder(Protocol):
    """What turns node embeddings into blocks."""

    def __call__(
        self, embeddings: Tensor, requests: Sequence[Request], *, seed: int, max_elements: int | None
    ) -> Iterator[DecodedGroup]:
        """Decodes every request once.

        Args:
            embeddings: Node embeddings, (T, C).
            requests: What to decode.
            seed: Seeds the rows that are drawn (class tokens of position embeddings).
            max_elements: Largest number of values to hold for one group; None for no limit.
        """
        ...


DECODERS: dict[str, Callable[[GHNConfig], TiledDecoder | LowRankDecoder]] = {
    "tiled": TiledDecoder,
    "low_rank": LowRankDecoder,
}
