"""Adapters in PEFT's format mean the same to the real library as to this one."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from ghn_client.errors import FileError, LoadError, UnsupportedModuleError
from ghn_client.finetune.additive import additive
from ghn_client.finetune.lora import low_rank_update
from ghn_client.finetune.norm_only import norm_only
from ghn_client.finetune.peft_format import export_peft, import_peft
from tests.finetune.networks import ResidualNetwork, train_a_little
from tests.finetune.public_libraries import public_library

IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
VECTORS = torch.randn(6, 4, generator=torch.Generator().manual_seed(2))


class Tower(nn.Module):
    """LayerNorm and RMSNorm between linear layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm = nn.Linear(4, 6), nn.LayerNorm(6)
        self.body, self.last = nn.Linear(6, 6), nn.RMSNorm(6)
        self.head = nn.Linear(6, 2)

    def forward(self, inputs):
        return self.head(self.last(torch.relu(self.body(self.norm(self.embed(inputs))))))


def grouped(**options):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 16, 3, stride=2, groups=4, **options),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


def base(kind):
    if kind == "grouped":
        return grouped().eval(), IMAGES
    return (Tower().eval(), VECTORS) if kind == "tower" else (ResidualNetwork(4).eval(), IMAGES)


@pytest.fixture(scope="module")
def peft():
    return public_library("peft")


def prepare(kind, strategy):
    network, inputs = base(kind)
    handle = norm_only(network) if strategy == "norm_only" else low_rank_update(network, rank=3, alpha=6.0)
    train_a_little(handle.module, handle.parameters(), inputs)
    return handle, inputs


CASES = [(kind, strategy) for kind in ("tower", "residual") for strategy in ("norm_only", "low_rank_update")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "strategy"), [*CASES, ("grouped", "low_rank_update")])
def test_the_real_library_computes_what_we_export(peft, tmp_path, kind, strategy):
    handle, inputs = prepare(kind, strategy)
    export_peft(handle, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(base(kind)[0], str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(loaded(inputs), handle.module(inputs), atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "strategy"), CASES)
def test_we_compute_what_the_real_library_exports(peft, tmp_path, kind, strategy):
    network, inputs = base(kind)
    norms = (
        ["norm", "last"]
        if kind == "tower"
        else ["norm", "blocks.0.bn1", "blocks.0.bn2", "blocks.1.bn1", "blocks.1.bn2"]
    )
    matrices = ["embed", "body"] if kind == "tower" else ["stem", "blocks.0.conv1"]
    config = (
        peft.LNTuningConfig(target_modules=norms, modules_to_save=["head"])
        if strategy == "norm_only"
        else peft.LoraConfig(r=2, lora_alpha=8, target_modules=matrices, rank_pattern={matrices[0]: 1})
    )
    wrapped = peft.get_peft_model(copy.deepcopy(network), config)
    groups = [{"params": [p for p in wrapped.parameters() if p.requires_grad]}]
    train_a_little(wrapped, groups, inputs, train=strategy == "norm_only")  # a LoRA adapter carries no statistics
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    handle = import_peft(network, tmp_path / "adapter")
    torch.testing.assert_close(handle.module.eval()(inputs), wrapped(inputs), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("kind", "strategy"), [*CASES, ("grouped", "low_rank_update")])
def test_round_trip_without_the_library(tmp_path, kind, strategy):
    handle, inputs = prepare(kind, strategy)
    export_peft(handle, tmp_path / "adapter")
    again = import_peft(base(kind)[0], tmp_path / "adapter")
    assert torch.equal(again.module.eval()(inputs), handle.module(inputs))


def test_what_peft_does_not_have_is_refused(tmp_path):
    with pytest.raises(UnsupportedModuleError):
        export_peft(additive(ResidualNetwork(4), width=3), tmp_path)
    inserted = norm_only(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)), missing="insert")
    with pytest.raises(UnsupportedModuleError):
        export_peft(inserted, tmp_path)


def test_convolutions_that_peft_computes_otherwise_are_refused(tmp_path):
    dilated = low_rank_update(grouped(dilation=2), rank=2)
    with pytest.raises(UnsupportedModuleError):
        export_peft(dilated, tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_adapters_that_mix_the_groups_of_a_convolution_are_refused(peft, tmp_path):
    wrapped = peft.get_peft_model(grouped(), peft.LoraConfig(r=4, target_modules=["2"]))
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(FileError):
        import_peft(grouped(), tmp_path / "adapter")


@pytest.mark.parametrize(
    "change", [{"peft_type": "IA3"}, {"use_dora": True}], ids=["another kind", "a variant of LoRA"]
)
def test_adapters_that_mean_something_else_are_refused(tmp_path, change):
    handle, _ = prepare("tower", "low_rank_update")
    folder = export_peft(handle, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(FileError):
        import_peft(Tower(), folder)


@pytest.mark.parametrize("strategy", ["norm_only", "low_rank_update"])
def test_an_adapter_of_another_network_is_refused_and_leaves_it_alone(tmp_path, strategy):
    handle, _ = prepare("tower", strategy)
    folder = export_peft(handle, tmp_path / "adapter")
    other = Tower()
    other.norm = nn.Identity()
    other.body = nn.Identity()
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(LoadError):
        import_peft(other, folder)
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())
