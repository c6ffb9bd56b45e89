from __future__ import annotations

import pytest

from ghn_service.hypernetwork.decoders import weight_scale


@pytest.mark.parametrize(
    ("shape", "beta", "fan_in"),
    [
        ((64, 32), 2, 32),
        ((64, 32, 3, 3), 2, 288),
        ((64, 1, 3, 3), 1, 9),
        ((64, 32, 1, 3), 1, 96),
        ((64, 32, 3, 1), 2, 96),
        ((64, 32, 5), 2, 160),
        ((64, 1, 5), 1, 5),
        ((1, 64, 7, 7), 2, 64 * 49),
    ],
    ids=str,
)
def test_fan_in_scale(shape, beta, fan_in):
    assert weight_scale(shape) == pytest.approx((beta / fan_in) ** 0.5)


@pytest.mark.parametrize("shape", [(1, 64, 14, 14), (1, 197, 768), (1, 64, 11, 11)], ids=str)
def test_position_embeddings_are_not_scaled(shape):
    assert weight_scale(shape) == 1
