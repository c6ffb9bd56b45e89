"""A short run for ``torchrun``; writes the hypernetwork's weights of the main process."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from ghn_service.training.distributed import join_workers
from tests.training.training_cases import make_trainer


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    with join_workers(torch.device("cpu")) as workers:
        trainer = make_trainer(folder, "limits.steps=3", "sampling.meta_batch=4", workers=workers)
        trainer.run()
        if workers.is_main:
            torch.save(
                {"weights": trainer.hypernetwork.state_dict(), "networks": trainer.progress.networks},
                folder / "weights.pt",
            )


if __name__ == "__main__":
    main()
