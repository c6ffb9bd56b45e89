"""The command for minutes on a GPU runs whole on a processor, goes on where it stopped, and leaves small files."""

from __future__ import annotations

import json

from benchmarks import gpu_run
from ghn_service.training.run_log import read_log
from tests.training.written_images import write_image_folder

TINY = (
    "hypernetwork.hidden_channels=8",
    "hypernetwork.num_heads=2",
    "hypernetwork.num_layers=1",
    "hypernetwork.max_shape=[8, 8, 3, 3]",
    "data.batch_size=4",
    "sampling.meta_batch=2",
    "sampling.pool=4",
    "sampling.largest_macs=1e9",
    "sampling.start_macs=1e9",
    "limits.log_every=1",
    "limits.validation_networks=1",
    "limits.validation_images=16",
    "threads=1",
)


def test_it_chooses_a_way_trains_and_goes_on(tmp_path):
    write_image_folder(tmp_path / "data", classes=3)
    out = tmp_path / "out"
    words = ["--data", str(tmp_path / "data"), "--out", str(out), "--minutes", "3", "--ways", "1"]
    words += ["--train-minutes", "0.02"]
    words += ["--trial-seconds", "2", *(word for change in TINY for word in ("--set", change))]
    gpu_run.main(words)
    assert json.loads((out / gpu_run.CHOICE).read_text())["processes"] == 1
    assert "| step | mean |" in (out / "summary.md").read_text()
    assert (out / "ghn.safetensors").is_file()
    assert list(out.glob("pool-*.json.gz"))
    steps = max(line["step"] for line in read_log(out))
    gpu_run.main([*words, "--train-minutes", "0.04"])
    assert max(line["step"] for line in read_log(out)) > steps
    assert all(path.stat().st_size < 16 * 2**20 for path in out.rglob("*") if path.is_file())
