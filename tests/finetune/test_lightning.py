"""A handle inside Lightning: the real library trains what the handle tunes, and nothing else."""

from __future__ import annotations

import sys

import pytest
import torch

from ghn_client.errors import MissingExtraError
from ghn_client.finetune.adapters import lightning_module
from ghn_client.finetune.delta import load_delta
from ghn_client.finetune.norm_only import norm_only
from tests.finetune.networks import ResidualNetwork
from tests.finetune.public_libraries import public_library


def test_without_lightning_the_message_names_it(monkeypatch):
    for name in ("lightning", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match="lightning"):
        lightning_module(norm_only(ResidualNetwork()))


@pytest.mark.filterwarnings("ignore")
def test_one_epoch_of_lightning_trains_the_handle_and_writes_its_delta(tmp_path):
    lightning = public_library("lightning")
    torch.manual_seed(0)
    handle = norm_only(ResidualNetwork())
    before = {name: value.clone() for name, value in handle.module.state_dict().items()}
    images, labels = torch.randn(24, 3, 8, 8), torch.randint(0, 4, (24,))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=8)
    module = lightning_module(handle, learning_rate=0.1, delta=tmp_path / "delta.safetensors")
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, loader)
    after = handle.module.state_dict()
    assert trainer.global_step == 3
    assert torch.equal(before["stem.weight"], after["stem.weight"])
    assert not torch.equal(before["norm.weight"], after["norm.weight"])
    tuned = load_delta(ResidualNetwork(), tmp_path / "delta.safetensors").merge().eval()
    torch.testing.assert_close(tuned(images), handle.merge().eval()(images))
