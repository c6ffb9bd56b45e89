"""The example for Lightning: the real library trains what the handle tunes, and nothing else."""

from __future__ import annotations

import pytest
import torch

from ghn_client.finetune.delta import load_delta
from tests.finetune.networks import ResidualNetwork
from tests.finetune.public_libraries import example, public_library


@pytest.mark.filterwarnings("ignore")
def test_one_epoch_of_lightning_trains_the_handle_and_writes_its_delta(tmp_path, monkeypatch):
    public_library("lightning")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    network = ResidualNetwork()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    images, labels = torch.randn(24, 3, 8, 8), torch.randint(0, 4, (24,))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=8)
    handle = example("lightning_training").tune(network, loader, "delta.safetensors")
    after = network.state_dict()
    assert torch.equal(before["stem.weight"], after["stem.weight"])
    assert not torch.equal(before["norm.weight"], after["norm.weight"])
    assert after["norm.num_batches_tracked"] == 3
    tuned = load_delta(ResidualNetwork(), "delta.safetensors").merge().eval()
    torch.testing.assert_close(tuned(images), handle.merge().eval()(images))
