from __future__ import annotations

import pytest
import torch

from ghn_service.hypernetwork.fill import FALLBACKS


def filled(rule: str, *shape: int, seed: int = 0) -> torch.Tensor:
    out = torch.full(shape, torch.nan)
    FALLBACKS[rule](out, torch.Generator().manual_seed(seed))
    return out


@pytest.mark.parametrize("rule", FALLBACKS)
@pytest.mark.parametrize("shape", [(), (1,), (5,), (4, 3), (2, 3, 4, 5)], ids=str)
def test_every_rule_fills_every_shape(rule, shape):
    assert torch.isfinite(filled(rule, *shape)).all()


@pytest.mark.parametrize("rule", FALLBACKS)
def test_the_generator_decides(rule):
    assert torch.equal(filled(rule, 6, 5, seed=3), filled(rule, 6, 5, seed=3))


@pytest.mark.parametrize(("rule", "value"), [("zeros", 0.0), ("ones", 1.0), ("layer_scale", 1e-6), ("prelu", 0.25)])
def test_constants(rule, value):
    assert filled(rule, 3).tolist() == pytest.approx([value] * 3)


@pytest.mark.parametrize(
    ("rule", "std"),
    [
        ("kaiming_normal", (2 / 200) ** 0.5),
        ("truncated_normal", 0.0176),
        ("embedding_normal", 0.02),
        ("recurrent_uniform", 200**-0.5 / 3**0.5),
    ],
)
def test_standard_deviations(rule, std):
    assert filled(rule, 100, 200).std().item() == pytest.approx(std, rel=0.03)
