"""Tensors as the bytes of a file."""

from __future__ import annotations

import torch

from ghn_service.server.tensor_memory import adjacent_buffers


def bytes_of(*tensors: torch.Tensor) -> bytes:
    return b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)


def test_tensors_that_lie_behind_each_other_are_one_view_of_their_memory() -> None:
    memory = torch.arange(10.0)
    parts = torch.split(memory, [1, 4, 2, 3])
    (buffer,) = adjacent_buffers([parts[0], parts[1].view(2, 2), parts[2], parts[3]])
    assert buffer == bytes_of(memory)
    memory[9] = 77.0
    assert bytes(buffer) == bytes_of(memory)


def test_gaps_other_memory_and_other_types_begin_a_new_piece() -> None:
    memory = torch.arange(10.0)
    other, half = torch.ones(3), torch.ones(2, dtype=torch.float16)
    buffers = list(adjacent_buffers([memory[:2], memory[3:5], memory[5:7], memory[:1], other, half]))
    expected = [memory[:2], memory[3:7], memory[:1], other, half]
    assert buffers == [bytes_of(tensor) for tensor in expected]


def test_a_tensor_that_is_not_contiguous_is_copied_in_its_order() -> None:
    matrix = torch.arange(6.0).view(2, 3)
    assert b"".join(adjacent_buffers([matrix.t(), matrix])) == bytes_of(matrix.t(), matrix)


def test_no_tensors_and_empty_tensors_are_no_bytes() -> None:
    assert list(adjacent_buffers([])) == []
    assert b"".join(adjacent_buffers([torch.empty(0), torch.ones(1), torch.empty(0, 3)])) == bytes_of(torch.ones(1))
