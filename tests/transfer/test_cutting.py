"""Channels that are left out live on in those that are kept."""

import pytest
import torch
from torch import nn

from ghn_client import export_architecture
from ghn_client.outputs import largest_relative_difference
from ghn_service.transfer.cutting import MAX_CHANNELS
from ghn_service.transfer.transfer import transfer_weights
from tests.transfer.pairs import make_source, randomise

EXAMPLE = torch.zeros(1, 3, 16, 16)


@pytest.fixture(autouse=True)
def same_weights():
    torch.manual_seed(0)


class Net(nn.Module):
    """A residual network of one block; ``width`` channels in its stream, ``inner`` in its branch."""

    def __init__(self, width, inner, *, normalize=True):
        super().__init__()

        def norm(channels):
            return nn.BatchNorm2d(channels) if normalize else nn.Identity()

        self.stem, self.stem_norm = nn.Conv2d(3, width, 3, padding=1, bias=not normalize), norm(width)
        self.first, self.first_norm = nn.Conv2d(width, inner, 3, padding=1, bias=not normalize), norm(inner)
        self.second, self.second_norm = nn.Conv2d(inner, width, 3, padding=1, bias=not normalize), norm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images):
        stem = torch.relu(self.stem_norm(self.stem(images)))
        branch = torch.relu(self.first_norm(self.first(stem)))
        return self.head(torch.relu(stem + self.second_norm(self.second(branch))).mean((2, 3)))


def repeat_channels(*layers):
    """The last four channels of layers become the first ones; the last layer's are a tenth as large, so that the copies
    are what is left out."""
    with torch.no_grad():
        for layer in layers:
            for name, values in layer.state_dict().items():
                if values.ndim:
                    is_scaled = layer is layers[-1] and name in ("weight", "bias")
                    values[-4:] = values[:4] * (0.1 if is_scaled else 1.0)


def difference(source, target, *, in_training=False):
    """Relative difference of the outputs of a source and of what it gives a narrower network."""
    result = transfer_weights(make_source(source, EXAMPLE), export_architecture(target, EXAMPLE))
    assert not result.plan.is_exact
    missing, unexpected = target.load_state_dict({**result.tensors, **result.statistics}, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return largest_relative_difference(source.train(in_training)(images), target.train(in_training)(images))


@pytest.mark.parametrize("normalize", [True, False])
def test_what_repeated_channels_did_is_done_by_those_that_are_kept(normalize):
    source = randomise(Net(8, 12, normalize=normalize), EXAMPLE, seed=0)
    repeat_channels(source.first, *([source.first_norm] if normalize else []))
    assert difference(source, Net(8, 8, normalize=normalize)) < 0.01


def test_channels_of_a_residual_stream_live_on_as_well():
    source = randomise(Net(12, 16), EXAMPLE, seed=0)
    for layers in ((source.stem, source.stem_norm), (source.second, source.second_norm)):
        repeat_channels(*layers)
    assert difference(source, Net(8, 16)) < 0.01


def test_channels_that_are_alike_are_compensated_in_part(monkeypatch):
    totals = []
    for limit in (MAX_CHANNELS, 0):  # with and without
        monkeypatch.setattr("ghn_service.transfer.cutting.MAX_CHANNELS", limit)
        differences = []
        for seed in range(6):
            torch.manual_seed(seed)
            source = randomise(Net(8, 12), EXAMPLE, seed=seed)
            repeat_channels(source.first, source.first_norm)
            with torch.no_grad():
                source.first.weight[-4:] += 0.1 * source.first.weight.std() * torch.randn(4, 8, 3, 3)
            differences.append(difference(source, Net(8, 8), in_training=True))
        totals.append(sum(differences))
    assert totals[0] < 0.5 * totals[1]
