from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from ghn_service.hypernetwork import sliced_linear as slices
from ghn_service.hypernetwork.sliced_linear import sliced_linear, take_slices

INDICES = [(slice(0, 3), slice(1, 4)), (slice(0, 6), slice(0, 5)), (slice(2, 4),)]


def test_slices_are_those_of_plain_indexing():
    parameter = torch.randn(6, 5, 4)
    for found, index in zip(take_slices(parameter, INDICES), INDICES, strict=True):
        assert torch.equal(found, parameter[index])


def test_all_slices_add_to_one_gradient():
    parameter = torch.randn(6, 5, 4, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(parameter[index].shape, dtype=torch.float64) for index in INDICES]
    found = sum((part * weight).sum() for part, weight in zip(take_slices(parameter, INDICES), weights, strict=True))
    expected = sum((parameter[index] * weight).sum() for index, weight in zip(INDICES, weights, strict=True))
    torch.testing.assert_close(*(torch.autograd.grad(value, parameter)[0] for value in (found, expected)))


def test_unused_slices_have_no_gradient():
    parameter = torch.randn(6, 5, requires_grad=True)
    used, _ = take_slices(parameter, INDICES[:2])
    used.sum().backward()
    assert parameter.grad is not None
    assert parameter.grad.sum() == 9


@pytest.mark.parametrize("elements", [1, 50, 10**6])
def test_products_do_not_depend_on_how_much_is_copied_at_once(monkeypatch, elements):
    monkeypatch.setattr(slices, "MAX_COPIED_ELEMENTS", elements)
    monkeypatch.setattr(slices, "MIN_DIRECT_ELEMENTS", 10**6)
    weight, bias, features = torch.randn(9, 7, 4)[:8, :5], torch.randn(9, 7)[:8, :5], torch.randn(2, 3, 4)
    expected = functional.linear(features, weight.reshape(40, 4), bias.reshape(40)).view(2, 3, 8, 5)
    with torch.no_grad():
        torch.testing.assert_close(sliced_linear(features, weight, bias), expected)
    torch.testing.assert_close(sliced_linear(features, weight, bias), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_slices_are_multiplied_where_they_are(monkeypatch, dtype):
    monkeypatch.setattr(slices, "MIN_DIRECT_ELEMENTS", 1)
    weight, bias, features = torch.randn(9, 7, 4), torch.randn(9, 7), torch.randn(2, 3, 4)
    weight, bias, features = weight.to(dtype)[:8, :5], bias.to(dtype)[:8, :5], features.to(dtype)
    expected = functional.linear(features.double(), weight.reshape(40, 4).double(), bias.reshape(40).double())
    with torch.no_grad():
        found = sliced_linear(features, weight, bias)
    torch.testing.assert_close(found, expected.view(2, 3, 8, 5).to(dtype))
