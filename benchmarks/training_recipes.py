"""Compares training recipes at an equal number of networks, on a family of small convolutional networks.

Each call trains one hypernetwork with the settings given and prints one JSON line: median loss and accuracy along the
way, and the accuracy of the averaged hypernetwork on 24 networks and 512 images that training never saw. The family is
that of the training tests; it is narrow, so that a recipe shows its worth within a minute or two.

Run with ``python -m benchmarks.training_recipes --data DIR --set NAME=VALUE ...``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from ghn_service.training.data import measure_normalization, require_images, split_validation
from ghn_service.training.distributed import Workers
from ghn_service.training.memory import keep_freed_memory
from ghn_service.training.run_log import read_log
from ghn_service.training.settings import load_settings
from ghn_service.training.trainer import Trainer
from ghn_service.training.zero_shot import make_validation
from tests.training.small_networks import SmallArchitecture

UNSEEN = range(1_000_000, 1_000_024)
BASE = (
    "sampling.start_macs=1e9",
    "sampling.largest_macs=1e9",
    "sampling.budget_macs=1e9",
    "limits.save_minutes=1000",
    "limits.validate_minutes=0",
    "limits.log_every=500",
    "limits.steps=2000",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="changes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    images, held_out = split_validation(require_images(options.data, "train", cache=options.cache), 5000)
    normalization = measure_normalization(images)
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            load_settings(None, (*BASE, *options.changes)),
            images,
            normalization,
            SmallArchitecture,
            Path(folder),
            Workers(0, 1, torch.device("cpu")),
            validation=make_validation(SmallArchitecture, UNSEEN, held_out.subset(torch.arange(512)), normalization),
        )
        trainer.run()
        records = read_log(Path(folder))
    curve = [{key: item[key] for key in ("step", "loss", "accuracy")} for item in records if item["kind"] == "train"]
    final = [item["accuracy"] for item in records if item["kind"] == "validation"][-1]
    print(
        json.dumps(
            {
                "benchmark": "training_recipes",
                "changes": options.changes,
                "accuracy": final,
                "curve": curve,
                "processor_s": round(time.process_time() - started, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
