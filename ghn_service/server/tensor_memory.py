"""Tensors as the bytes of a file, without copies and in as few pieces as their memory allows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch


def adjacent_buffers(tensors: Iterable[torch.Tensor]) -> Iterator[memoryview]:
    """The values of CPU tensors as bytes, in order; tensors that lie behind each other in one memory are one buffer.

    Args:
        tensors: Of any shapes; a tensor that is not contiguous is copied.
    """
    run: list[torch.Tensor] = []
    for tensor in tensors:
        contiguous = tensor.detach().contiguous()
        if run and not _follows(run[-1], contiguous):
            yield _join(run)
            run = []
        run.append(contiguous)
    if run:
        yield _join(run)


def _follows(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether ``other`` begins where ``one`` ends."""
    same_memory = one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    return same_memory and one.dtype == other.dtype and one.data_ptr() + one.nbytes == other.data_ptr()


def _join(run: list[torch.Tensor]) -> memoryview:
    """Contiguous tensors that follow each other, as one view."""
    count = sum(tensor.numel() for tensor in run)
    return run[0].as_strided((count,), (1,)).view(torch.uint8).numpy().data
