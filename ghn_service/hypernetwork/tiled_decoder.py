"""The decoder of GHN-2 and GHN-3: blocks of at most ``max_shape`` channels, which are repeated to fit.

Legend: T nodes, P tensors of a group, C hidden channels, (h, w) kernel, (o, i) channels of a block, (Mo, Mi, Mh, Mw)
``max_shape``, K classes.

Reference: Knyazev et al. 2021 (arXiv:2110.13100), appendix A; Knyazev et al. 2023 (arXiv:2303.04143), section 3.3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ghn_service.hypernetwork.activations import ACTIVATIONS
from ghn_service.hypernetwork.blocks import (
    VECTOR_ROLES,
    DecodedGroup,
    Request,
    as_tensors,
    grouped,
    kernel_slices,
    parts,
    resize,
    role_and_shape,
)
from ghn_service.hypernetwork.config import GHNConfig
from ghn_service.hypernetwork.features import Role
from ghn_service.hypernetwork.initialization import shrink_layer
from ghn_service.hypernetwork.scaling import weight_scale
from ghn_service.hypernetwork.slices import sliced_linear, take_slices
from ghn_service.hypernetwork.vector_decoder import VectorDecoder


class TiledDecoder(nn.Module):
    """The decoder of GHN-2 and GHN-3: a grid of kernel positions, and a block of channels at each.

    An embedding is spread over a grid of ``max_shape[2:]`` positions; every position is decoded on its own to
    ``max_shape[:2]`` channels. Smaller kernels take a part of the grid, larger ones are interpolated from it.

    Args:
        config: Sizes.
    """

    def __init__(self, config: GHNConfig) -> None:
        super().__init__()
        channels = config.hidden_channels
        max_out, max_in, max_height, max_width = config.max_shape
        self.max_shape = config.max_shape
        self.weight_norm = config.weight_norm
        self.activation = ACTIVATIONS[config.decoder_activation]
        self.is_centered = config.kernel_crop == "center"
        self.grid = nn.Linear(channels, 4 * channels * max_height * max_width)
        self.hidden = nn.Linear(4 * channels, 8 * channels)
        self.output = nn.Linear(8 * channels, max_out * max_in)
        self.class_output = nn.Linear(max_out, config.num_classes)
        self.vectors = VectorDecoder(config)

    def scale_first_predictions(self) -> None:
        """Brings the first predictions of an untrained decoder close to their mean."""
        for layer in (self.output, self.class_output, self.vectors.output):
            shrink_layer(layer)

    def forward(
        self, embeddings: Tensor, requests: Sequence[Request], *, seed: int = 0, max_elements: int | None = None
    ) -> Iterator[DecodedGroup]:
        """Decodes every request once; see ``ParameterDecoder``."""
        yield from self.vectors(embeddings, requests)
        matrices = [index for index, request in enumerate(requests) if request.target.role not in VECTOR_ROLES]
        grids = self._grids([requests[index].target.kernel for index in matrices])
        outputs = self._outputs([self._block_sizes(requests[index]) for index in matrices])
        for kernel, same_kernel in grouped(matrices, lambda index: requests[index].target.kernel).items():
            hidden = self._positions(embeddings[[requests[index].row for index in same_kernel]], *grids[kernel])
            place = {index: position for position, index in enumerate(same_kernel)}
            for sizes, members in grouped(same_kernel, lambda index: self._block_sizes(requests[index])).items():
                elements = hidden.shape[1] * hidden.shape[2] * sizes[0] * sizes[1]
                for part in parts(members, elements, max_elements):
                    blocks = sliced_linear(hidden[[place[index] for index in part]], *outputs[sizes])  # (P, h, w, o, i)
                    blocks = blocks.permute(0, 3, 4, 1, 2)
                    yield from self._finish(resize(blocks, kernel), part, requests, seed)

    def _grids(self, kernels: Sequence[tuple[int, int]]) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
        """Weight (4C, h, w, C) and bias (4C, h, w) of the grid positions that each kernel takes."""
        distinct = sorted(set(kernels))
        limits = self.max_shape[2:]
        indices = [(slice(None), *kernel_slices(kernel, limits, is_centered=self.is_centered)) for kernel in distinct]
        weight = torch.unflatten(self.grid.weight, 0, (-1, *self.max_shape[2:]))  # (4C, Mh, Mw, C)
        bias = torch.unflatten(self.grid.bias, 0, (-1, *self.max_shape[2:]))
        pairs = zip(take_slices(weight, indices), take_slices(bias, indices), strict=True)
        return dict(zip(distinct, pairs, strict=True))

    def _outputs(self, sizes: Sequence[tuple[int, int]]) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
        """Weight (o, i, 8C) and bias (o, i) of the last layer for each (o, i)."""
        distinct = sorted(set(sizes))
        indices = [(slice(0, out_channels), slice(0, in_channels)) for out_channels, in_channels in distinct]
        weight = torch.unflatten(self.output.weight, 0, self.max_shape[:2])
        bias = torch.unflatten(self.output.bias, 0, self.max_shape[:2])
        pairs = zip(take_slices(weight, indices), take_slices(bias, indices), strict=True)
        return dict(zip(distinct, pairs, strict=True))

    def _positions(self, embeddings: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Features of every kernel position, (P, h, w, 8C), with h and w at most those of the grid."""
        grid = self.activation(sliced_linear(embeddings, weight, bias))  # (P, 4C, h, w)
        return self.activation(self.hidden(grid.permute(0, 2, 3, 1)))

    def _block_sizes(self, request: Request) -> tuple[int, int]:
        """(o, i) to decode: what the tensor needs, rounded up to a power of two so that more tensors share a batch."""
        out_channels, in_channels = request.target.channels
        if request.target.role is Role.CLASS_MATRIX:
            out_channels = self.max_shape[0]
        return _round_up(out_channels, self.max_shape[0]), _round_up(in_channels, self.max_shape[1])

    def _finish(
        self, blocks: Tensor, members: Sequence[int], requests: Sequence[Request], seed: int
    ) -> Iterator[DecodedGroup]:
        """Cuts blocks to their tensors' sizes, gives them the tensors' axes, and scales them, shape by shape."""
        place = {index: position for position, index in enumerate(members)}
        for (role, shape), group in grouped(members, lambda index: role_and_shape(requests[index])).items():
            part = blocks if len(group) == len(members) else blocks[[place[index] for index in group]]
            out_channels, in_channels = requests[group[0]].target.channels
            part = part[:, :, :in_channels]
            if role is Role.CLASS_MATRIX:
                part = self._classes(part)
            part = part[:, :out_channels]
            part = as_tensors(part, group, requests, seed=seed)
            yield DecodedGroup(tuple(group), part * weight_scale(shape) if self.weight_norm else part)

    def _classes(self, blocks: Tensor) -> Tensor:
        """The classifier's weight: (P, Mo, i, 1, 1) -> (P, K, i, 1, 1)."""
        features = self.activation(blocks[..., 0, 0]).transpose(1, 2)  # (P, i, Mo)
        classes: Tensor = self.class_output(features)
        return classes.transpose(1, 2)[..., None, None]


def _round_up(size: int, limit: int) -> int:
    return limit if size >= limit else min(limit, 1 << (size - 1).bit_length())
