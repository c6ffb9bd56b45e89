"""Attention with other scales and wider heads: what is made good by a gain, and what would see that gain."""

import pytest
import torch
from torch import nn

from ghn_client.outputs import largest_relative_difference
from tests.transfer.pairs import randomise, transfer_between

EXAMPLE = torch.zeros(1, 3, 16, 16)


class Attention(nn.Module):
    """One head of ``size`` channels on patches; ``way`` says what else happens to its queries and values."""

    def __init__(self, size, scale, way="", residual=1.0):
        super().__init__()
        self.scale, self.residual, self.way = scale, residual, way
        self.patch, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 5)
        self.queries, self.keys, self.values = (nn.Linear(8, size) for _ in range(3))
        self.out, self.norm = nn.Linear(size, 8), nn.LayerNorm(size)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        queries, keys = self.queries(x), self.keys(x)
        if self.way == "norm":
            queries = self.norm(queries)
        if self.way == "scaled queries":
            queries = queries * self.scale
            logits = queries @ keys.transpose(1, 2)
        else:
            logits = queries @ keys.transpose(1, 2) * self.scale
        y = logits.softmax(-1) @ self.values(x)
        if self.way == "tanh":
            y = torch.tanh(y + queries)
        elif self.way in ("sum", "scaled queries"):
            y = y + queries
        elif self.way == "product":
            y = y * queries
        return self.head((self.residual * x + self.out(y)).mean(1))


def compare(source, target):
    """Whether the target is called exact, and the difference of the outputs."""
    source, target = randomise(source, EXAMPLE, seed=0), randomise(target, EXAMPLE, seed=1)
    result = transfer_between(source, target, EXAMPLE)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return result.plan.is_exact, largest_relative_difference(source(images), target(images))


@pytest.mark.parametrize("way", ["", "sum", "norm"])
@pytest.mark.parametrize(("size", "scale"), [(8, 0.1), (16, 0.25), (32, 0.5)])
def test_wider_heads_and_other_scales_are_made_good(size, scale, way):
    is_exact, difference = compare(Attention(8, 8**-0.5, way, 0.5), Attention(size, scale, way, 0.5))
    assert is_exact
    assert difference <= 1e-4


@pytest.mark.parametrize("way", ["tanh", "product", "scaled queries"])
def test_what_would_see_the_gain_is_not_called_exact(way):
    assert not compare(Attention(8, 0.5, way), Attention(16, 0.25, way))[0]
    assert not compare(Attention(8, 0.5, way), Attention(8, 0.25, way))[0]
    assert compare(Attention(8, 0.5, way), Attention(8, 0.5, way)) == (True, 0)


def test_a_number_beside_a_scale_is_compared():
    """Equal numbers are one constant of the file: of scales it is made good, elsewhere it is not."""
    assert not compare(Attention(8, 0.5, "", 0.5), Attention(8, 0.25, "", 0.25))[0]
