"""``load_parameters``: all or nothing, ties stay ties, the meta device gets memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ghn_client import load_parameters
from ghn_client.errors import LoadError
from tests.clients.small_modules import ConvNet, Tied, randomized


def values_for(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: torch.full(tensor.shape, 3.0) for name, tensor in module.named_parameters()}


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def test_every_parameter_is_loaded() -> None:
    module = ConvNet()
    report = load_parameters(module, values_for(module))
    assert report.is_complete
    assert report.loaded == tuple(name for name, _ in module.named_parameters())
    assert all((parameter == 3).all() for parameter in module.parameters())


@pytest.mark.parametrize("fault", ["missing", "unexpected", "mismatched"])
def test_nothing_changes_if_the_weights_do_not_fit(fault: str) -> None:
    module = randomized(ConvNet())
    values, before = values_for(module), snapshot(module)
    if fault == "missing":
        del values["fc.bias"]
    elif fault == "unexpected":
        values["other"] = torch.zeros(1)
    else:
        values["fc.bias"] = torch.zeros(11)
    with pytest.raises(LoadError):
        load_parameters(module, values)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_what_fits_is_loaded_if_not_strict() -> None:
    module = randomized(ConvNet())
    bias = module.fc.bias.clone()
    values = {**values_for(module), "fc.bias": torch.zeros(11), "other": torch.zeros(1)}
    del values["bn1.weight"]
    report = load_parameters(module, values, strict=False)
    assert report.missing == ("bn1.weight",)
    assert report.unexpected == ("other",)
    assert report.mismatched == {"fc.bias": ((10,), (11,))}
    assert torch.equal(module.fc.bias, bias)
    assert (module.conv1.weight == 3).all()


@pytest.mark.parametrize("given", ["first.weight", "second.weight"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("assign", [True, False])
def test_one_name_is_enough_for_tied_parameters(given: str, device: str, assign: bool) -> None:
    with torch.device(device):
        module = Tied()
    values = {"first.bias": torch.zeros(6), "second.bias": torch.zeros(6), given: torch.full((6, 6), 2.0)}
    report = load_parameters(module, values, assign=assign)
    assert report.is_complete
    assert {"first.weight", "second.weight"} <= set(report.loaded)
    assert module.first.weight is module.second.weight
    assert (module.first.weight == 2).all()


@pytest.mark.parametrize("assign", [True, False])
def test_a_module_on_meta_gets_memory_and_initial_statistics(assign: bool) -> None:
    with torch.device("meta"):
        module = ConvNet()
    report = load_parameters(module, values_for(module), assign=assign)
    assert not any(tensor.is_meta for tensor in module.state_dict().values())
    assert (module.bn1.running_mean == 0).all()
    assert (module.bn1.running_var == 1).all()
    assert module.bn1.num_batches_tracked == 0
    assert "bn1.running_mean" in report.reset_buffers
    assert torch.isfinite(module(torch.rand(2, 3, 8, 8))).all()


def test_unknown_buffers_on_meta_are_refused_before_anything_changes() -> None:
    with torch.device("meta"):
        module = nn.Linear(2, 2)
        module.register_buffer("mask", torch.ones(2))
    with pytest.raises(LoadError, match="mask"):
        load_parameters(module, values_for(module))
    assert module.weight.is_meta


def test_assigned_tensors_are_the_parameters() -> None:
    module = nn.Linear(2, 2)
    values = values_for(module)
    load_parameters(module, values, assign=True)
    assert module.weight.data_ptr() == values["weight"].data_ptr()
    assert isinstance(module.weight, nn.Parameter)


def test_copied_values_take_the_modules_element_type() -> None:
    module = nn.Linear(2, 2).double()
    load_parameters(module, {name: value.bfloat16() for name, value in values_for(module).items()})
    assert module.weight.dtype == torch.float64


def test_frozen_parameters_stay_frozen() -> None:
    with torch.device("meta"):
        module = nn.Linear(2, 2)
    module.weight.requires_grad_(False)
    load_parameters(module, values_for(module))
    assert not module.weight.requires_grad
    assert module.bias.requires_grad


def test_an_optimizer_made_before_loading_trains_the_loaded_values() -> None:
    module = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    load_parameters(module, values_for(module))
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert (module.weight == 2).all()


def test_fallbacks_are_reported() -> None:
    module = nn.Linear(2, 2)
    report = load_parameters(module, values_for(module), origins={"weight": "predicted", "bias": "fallback:zeros"})
    assert report.fallback == ("bias",)
