"""Data-parallel training over processes started by ``torchrun``: each takes a share of every meta-batch.

Gradients of the hypernetwork are summed over processes in one flat all-reduce per step. That is what
``DistributedDataParallel`` does, too, but here a process may have skipped all of its networks (not finite, out of
memory) and still takes part, and parameters without a gradient in one process are no special case.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import distributed


@dataclass(frozen=True)
class Workers:
    """This process among those of the run, and where it computes."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def share(self, costs: Sequence[float]) -> list[int]:
        """Which networks of a meta-batch this process computes, so that all finish at about the same time.

        Greedy: the most expensive network left goes to the process with the least work.
        """
        loads = [0.0] * self.world_size
        mine: list[int] = []
        for index in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
            worker = min(range(self.world_size), key=lambda item: (loads[item], item))
            loads[worker] += costs[index]
            if worker == self.rank:
                mine.append(index)
        return sorted(mine)

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums ``tensor`` over all processes, in place."""
        if self.world_size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Sums the gradients of ``parameters`` over all processes, in place; a missing gradient counts as 0."""
        if self.world_size == 1:
            return
        flat = torch.cat(
            [(torch.zeros_like(item) if item.grad is None else item.grad).reshape(-1) for item in parameters]
        )
        distributed.all_reduce(flat)
        for item, part in zip(parameters, torch.split(flat, [item.numel() for item in parameters]), strict=True):
            item.grad = part.view_as(item).clone()

    def wait(self) -> None:
        """Waits until all processes are here."""
        if self.world_size > 1:
            distributed.barrier()

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set in any process."""
        return bool(self.sum_(torch.tensor(float(flag), device=self.device)).item() > 0)


@contextmanager
def join_workers(device: torch.device | None = None) -> Iterator[Workers]:
    """The processes of this run, as ``torchrun`` describes them in the environment; one process without it.

    Where no device is given, each process has a GPU of its own, or a share of one where there are fewer, otherwise the
    CPU. Processes that share a GPU talk through gloo.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    if device is None:
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        count = torch.cuda.device_count()
        device = torch.device("cuda", local_rank % count) if count else torch.device("cpu")
    if world_size == 1:
        yield Workers(0, 1, device)
        return
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size)))
    has_own = device.type == "cuda" and torch.cuda.device_count() >= local_size
    distributed.init_process_group("nccl" if has_own else "gloo")
    try:
        yield Workers(rank, world_size, device)
    finally:
        distributed.destroy_process_group()
