"""The Trainer of transformers trains what a handle tunes, and nothing else."""

from __future__ import annotations

import pytest
import torch

from ghn_client.finetune.adapters import trainer_optimizers
from ghn_client.finetune.delta import load_delta, save_delta
from ghn_client.finetune.norm_only import norm_only
from tests.finetune.public_libraries import public_library


@pytest.mark.filterwarnings("ignore")
def test_trainer_tunes_norm_layers_alone(tmp_path):
    transformers = public_library("transformers")
    public_library("accelerate")
    configuration = transformers.ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )

    def network():
        torch.manual_seed(0)
        return transformers.ResNetForImageClassification(configuration)

    handle = norm_only(network(), statistics="freeze")
    before = {name: value.clone() for name, value in handle.module.state_dict().items()}
    samples = [{"pixel_values": torch.randn(3, 16, 16), "labels": i % 3} for i in range(8)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True, save_strategy="no"
    )
    optimizers = trainer_optimizers(handle, learning_rate=0.01)
    transformers.Trainer(handle.module, arguments, train_dataset=samples, optimizers=optimizers).train()
    after = handle.module.state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed
    assert changed <= set(handle.parts[0].state())
    save_delta(handle, tmp_path / "delta.safetensors")
    again = load_delta(network(), tmp_path / "delta.safetensors").module.eval()
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(again(images).logits, handle.module.eval()(images).logits)
