"""What decoders have in common: requests, groups of decoded blocks, and how blocks become tensors of a shape.

Legend: P tensors of a group, (o, i) channels of a block, (h, w) kernel, g side of a position grid.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from ghn_service.hypernetwork.features import Role, Target

CLASS_TOKEN_STD = 0.02
VECTOR_ROLES = (Role.VECTOR, Role.BIAS, Role.CLASS_BIAS)

Key = TypeVar("Key")


@dataclass(frozen=True, slots=True)
class Request:
    """A tensor to decode: what it is, and the row of its node's embedding among all T."""

    target: Target
    row: int


@dataclass(frozen=True, eq=False, slots=True)
class DecodedGroup:
    """Blocks for tensors of one shape.

    Attributes:
        indices: Position of each tensor among the requests.
        blocks: Scaled values, (P, *block), with the tensor's axes; smaller than the tensor where it must be repeated.
    """

    indices: tuple[int, ...]
    blocks: Tensor


def drawn_generator(seed: int, draw: int) -> torch.Generator:
    """A generator for one tensor, so that its values do not depend on what else is drawn.

    Args:
        seed: The request's seed.
        draw: Index of the tensor among all parameters of its graph.
    """
    mixed = (seed * 0x9E3779B97F4A7C15 + (draw + 1) * 0xD1B54A32D192ED03) % 2**64
    mixed ^= mixed >> 31
    mixed = mixed * 0xBF58476D1CE4E5B9 % 2**64
    return torch.Generator().manual_seed((mixed ^ (mixed >> 29)) % 2**63)


def role_and_shape(request: Request) -> tuple[Role, tuple[int, ...]]:
    """Tensors that agree in this are decoded together."""
    return request.target.role, request.target.shape


def grouped(indices: Sequence[int], key: Callable[[int], Key]) -> dict[Key, list[int]]:
    """The indices by key, both in order of first appearance."""
    groups: dict[Key, list[int]] = defaultdict(list)
    for index in indices:
        groups[key(index)].append(index)
    return groups


def parts(members: list[int], elements: int, max_elements: int | None) -> Iterator[list[int]]:
    """Splits a group so that no part has more than ``max_elements`` values, as far as single members allow."""
    size = len(members) if max_elements is None else max(1, max_elements // elements)
    for start in range(0, len(members), size):
        yield members[start : start + size]


def crop(size: int, limit: int, *, is_centered: bool) -> slice:
    """The part of a grid of ``limit`` positions that a kernel of ``size`` takes; all of it if the kernel is larger."""
    if not is_centered:
        return slice(0, min(size, limit))
    middle = limit // 2
    return slice(max(0, middle - size // 2), min(limit, middle + math.ceil(size / 2)))


def kernel_slices(kernel: tuple[int, int], limits: tuple[int, int], *, is_centered: bool) -> tuple[slice, slice]:
    """``crop`` for height and width."""
    height, width = (crop(size, limit, is_centered=is_centered) for size, limit in zip(kernel, limits, strict=True))
    return height, width


def resize(blocks: Tensor, kernel: tuple[int, int]) -> Tensor:
    """Interpolates blocks (P, o, i, h, w) to a kernel that is larger than the grid."""
    if blocks.shape[3:] == kernel:
        return blocks
    flat = blocks.flatten(0, 1)
    resized = functional.interpolate(flat, kernel, mode="bilinear", align_corners=False)
    return torch.unflatten(resized, 0, blocks.shape[:2])


def as_tensors(blocks: Tensor, members: Sequence[int], requests: Sequence[Request], *, seed: int) -> Tensor:
    """Blocks (P, o, i, h, w), already of the right sizes, with the axes of their tensors: (P, *shape).

    Args:
        blocks: Decoded blocks.
        members: The requests that they belong to, which agree in role and shape.
        requests: All requests.
        seed: The request's seed.
    """
    role, shape = role_and_shape(requests[members[0]])
    if role is Role.POSITION:
        return position_rows(blocks, shape, [requests[index].target.draw for index in members], seed)
    return blocks.reshape(len(members), *blocks.shape[1:3], *shape[2:])


def position_rows(blocks: Tensor, shape: tuple[int, ...], draws: Sequence[int], seed: int) -> Tensor:
    """Rows of a position embedding: drawn rows for class and other prefix tokens, then the grid in row-major order.

    Hypernetworks were trained without class tokens, so these rows are N(0, 0.02) as in the reference, but drawn from
    the request's seed.

    Args:
        blocks: Decoded grids, (P, 1, i, g, g).
        shape: (1, tokens, dimensions).
        draws: Seeds of the P tensors.
        seed: The request's seed.

    Returns:
        (P, 1, tokens, i).
    """
    grid = blocks.flatten(3).transpose(2, 3)  # (P, 1, g * g, i)
    num_prefix = max(0, shape[1] - grid.shape[2])
    if num_prefix:
        drawn = [
            torch.randn(1, num_prefix, grid.shape[3], generator=drawn_generator(seed, draw)) * CLASS_TOKEN_STD
            for draw in draws
        ]
        grid = torch.cat((torch.stack(drawn).to(grid), grid), dim=2)
    return grid[:, :, : shape[1]]
