"""The example for transformers: its Trainer trains what a handle tunes, and nothing else."""

from __future__ import annotations

import pytest
import torch

from ghn_client.finetune.delta import load_delta
from tests.finetune.public_libraries import example, public_library


@pytest.mark.filterwarnings("ignore")
def test_trainer_tunes_norm_layers_alone(tmp_path, monkeypatch):
    for library in ("transformers", "accelerate"):
        public_library(library)
    monkeypatch.chdir(tmp_path)
    script = example("hf_trainer")
    network = script.small_resnet()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    samples = [{"pixel_values": torch.randn(3, 16, 16), "labels": i % 3} for i in range(8)]
    handle = script.tune(network, samples, "delta.safetensors")
    after = network.state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed
    assert changed <= set(handle.parts[0].state())
    again = load_delta(script.small_resnet(), "delta.safetensors").module.eval()
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(again(images).logits, handle.module.eval()(images).logits)
