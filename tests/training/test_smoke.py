"""A short training on real images really lowers the loss."""

from __future__ import annotations

import torch

from ghn_service.training.run import fit
from ghn_service.training.run_log import read_log
from ghn_service.training.settings import load_settings
from tests.shared_data import shared_path
from tests.training.small_networks import SmallArchitecture

RECIPE = (
    "hypernetwork={hidden_channels=16, num_heads=4, num_layers=1, max_shape=[32,32,5,5]}",
    "optimizer.name=muon",
    "optimizer.muon_learning_rate=0.02",
    "optimizer.clip=1.0",
    "sampling.largest_macs=2e6",
    "sampling.start_macs=2e6",
    "data.batch_size=48",
    "limits.steps=200",
    "limits.log_every=10",
    "limits.validate_minutes=0",
    "limits.validation_networks=4",
    "limits.validation_images=256",
    "threads=1",
)


def test_training_on_real_images_lowers_the_loss(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.parquet").symlink_to(shared_path("data/cifar10-jpeg/test.parquet"))  # the smaller file
    threads = torch.get_num_threads()
    try:
        fit(tmp_path / "data", tmp_path / "run", load_settings(None, RECIPE), source=SmallArchitecture)
    finally:
        torch.set_num_threads(threads)
    records = read_log(tmp_path / "run")
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert sum(losses[-3:]) / 3 < sum(losses[:2]) / 2 - 0.15
    accuracy = [record["accuracy"] for record in records if record["kind"] == "validation"][-1]
    assert accuracy > 0.16, "chance is 0.1"
    assert (tmp_path / "run" / "ghn.safetensors").is_file()
