"""From decoded blocks to tensors of any size: blocks are cut, or repeated whole along each axis.

``tile_to_shape`` is differentiable and batched, for training. ``write_tiled`` fills memory that is there already and
reads and writes each output value once, for serving: predicting a network is bound by memory, not by arithmetic.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def tile_to_shape(blocks: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Cuts or repeats blocks along every axis but the first.

    Args:
        blocks: (P, *block shape).
        shape: Shape wanted of each, with as many axes as a block.

    Returns:
        (P, *shape); entry ``i`` along an axis is entry ``i mod size`` of the block.
    """
    if blocks.shape[1:] == shape:
        return blocks
    repeats = [math.ceil(wanted / size) for wanted, size in zip(shape, blocks.shape[1:], strict=True)]
    if max(repeats) > 1:
        blocks = blocks.repeat(1, *repeats)
    for axis, wanted in enumerate(shape, start=1):
        blocks = blocks.narrow(axis, 0, wanted)
    return blocks


def write_tiled(block: Tensor, out: Tensor) -> None:
    """Fills ``out`` with copies of ``block``, converting to its dtype.

    The axes behind the first repeated one are tiled in a small copy, which stays in the processor's cache while it is
    written again and again.

    Args:
        block: Values; no axis is longer than that of ``out``.
        out: Contiguous memory to fill, with as many axes as ``block``.
    """
    repeated = [axis for axis, (size, wanted) in enumerate(zip(block.shape, out.shape, strict=True)) if size < wanted]
    if not repeated:
        out.copy_(block)
        return
    first = repeated[0]
    band_shape = (*block.shape[: first + 1], *out.shape[first + 1 :])
    band = tile_to_shape(block.to(out.dtype)[None], band_shape)[0].contiguous()
    size, wanted = block.shape[first], out.shape[first]
    whole = wanted - wanted % size
    head = torch.unflatten(out.narrow(first, 0, whole), first, (whole // size, size))
    head.copy_(band.unsqueeze(first))
    if whole < wanted:
        out.narrow(first, whole, wanted - whole).copy_(band.narrow(first, 0, wanted - whole))
