from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ghn_service.hypernetwork.tiling import tile_to_shape, write_tiled

sizes = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 14)), min_size=1, max_size=4)


def tiled_entry_by_entry(block: Tensor, shape: tuple[int, ...]) -> Tensor:
    index = torch.meshgrid(
        *(torch.arange(wanted) % size for wanted, size in zip(shape, block.shape, strict=True)), indexing="ij"
    )
    return block[index]


@given(sizes, st.integers(1, 3))
def test_tiles_repeat_whole_blocks(pairs, num_blocks):
    block_shape, shape = zip(*pairs, strict=True)
    blocks = torch.arange(num_blocks * torch.Size(block_shape).numel(), dtype=torch.float32).view(
        num_blocks, *block_shape
    )
    found = tile_to_shape(blocks, shape)
    assert all(torch.equal(found[i], tiled_entry_by_entry(blocks[i], shape)) for i in range(num_blocks))


@given(sizes, st.sampled_from([torch.float32, torch.bfloat16]), st.booleans())
def test_writing_in_place_gives_the_same_tiles(pairs, dtype, reverse):
    pairs = [(min(size, wanted), wanted) for size, wanted in pairs]
    block_shape, shape = zip(*pairs, strict=True)
    block = torch.arange(torch.Size(block_shape).numel(), dtype=torch.float32).view(block_shape)
    if reverse:
        block = block.permute(*reversed(range(block.dim()))).contiguous().permute(*reversed(range(block.dim())))
    out = torch.full(shape, -1, dtype=dtype)
    write_tiled(block, out)
    assert torch.equal(out, tiled_entry_by_entry(block, shape).to(dtype))


def test_gradients_of_repeated_entries_add_up():
    block = torch.zeros(1, 2, requires_grad=True)
    tile_to_shape(block, (5,)).sum().backward()
    assert block.grad.tolist() == [[3.0, 2.0]]
