"""The stream of target networks: deterministic, thinned by cost, resumable, and tough."""

from __future__ import annotations

import pytest
import torch

from ghn_architectures.architecture import CANONICAL
from ghn_service.errors import InvalidOptionError, TrainingError
from ghn_service.hypernetwork.ghn import GHNConfig
from ghn_service.training.networks import (
    DrawnPool,
    NetworkStream,
    Pool,
    largest_macs,
    multiply_adds,
    prepare_network,
    training_pools,
)
from ghn_service.training.settings import SamplingSettings
from tests.training.small_networks import SmallArchitecture

WIDE_OPEN = SamplingSettings(budget_macs=1e12, largest_macs=1e12, start_macs=1e12)
CONFIG = GHNConfig(hidden_channels=8, num_heads=2, num_layers=1, max_shape=(8, 8, 5, 5), num_classes=10)


def numbers(stream: NetworkStream, count: int) -> list[int]:
    return [index for index, _ in stream.take(count, progress=1.0)]


@pytest.mark.parametrize(
    ("sampling", "earlier", "expected"),
    [
        ({"split": "broad", "pool": 3}, {}, {"broad": 3}),
        ({"split": "broad", "pool": 3}, {"train": 9, "broad": 5}, {"broad": 5, "train": 9}),
        ({"pool": 3}, {"broad": 5, "train": 2}, {"train": 3, "broad": 5}),  # of an older card
    ],
)
def test_pools_of_a_run_and_those_before_are_joined_by_split(sampling, earlier, expected):
    assert list(training_pools({"sampling": sampling}, earlier).items()) == list(expected.items())


def test_without_limits_every_network_comes_once():
    assert numbers(NetworkStream(SmallArchitecture, WIDE_OPEN), 5) == [0, 1, 2, 3, 4]


def test_a_stream_goes_on_where_another_stopped():
    settings = SamplingSettings(budget_macs=1e6, largest_macs=1e7, start_macs=1e7)
    whole = numbers(NetworkStream(SmallArchitecture, settings), 12)
    first = NetworkStream(SmallArchitecture, settings)
    assert numbers(first, 5) == whole[:5]
    second = NetworkStream(SmallArchitecture, settings, next_index=first.next_index)
    assert numbers(second, 7) == whole[5:]


def test_networks_above_the_limit_are_left_out():
    settings = SamplingSettings(budget_macs=1e12, largest_macs=2e6, start_macs=2e6)
    taken = NetworkStream(SmallArchitecture, settings).take(20, 1.0)
    assert all(network.multiply_adds <= 2e6 for _, network in taken)


def test_expensive_networks_are_thinned_in_proportion():
    class Fixed:
        family = "fixed"

        def __init__(self, index):
            self.multiply_adds = 4_000_000 if index % 2 else 1_000_000

    settings = SamplingSettings(budget_macs=1e6, largest_macs=1e9, start_macs=1e9)
    taken = NetworkStream(Fixed, settings).take(1000, 1.0)
    expensive = sum(network.multiply_adds > 1e6 for _, network in taken)
    assert 0.15 < expensive / 1000 < 0.25


def test_families_are_thinned_to_their_share_anew_in_every_round_of_the_pool():
    class OneOfTwoFamilies:
        multiply_adds = 1_000_000

        def __init__(self, index):
            self.number = index % 10
            self.family = "rare" if self.number % 2 else "frequent"

    settings = SamplingSettings(budget_macs=1e7, start_macs=1e7, keep={"frequent": 0.25})
    taken = NetworkStream(OneOfTwoFamilies, settings).take(1000, 1.0)
    frequent = [network.number for _, network in taken if network.family == "frequent"]
    assert 0.15 < len(frequent) / 1000 < 0.25
    assert set(frequent) == {0, 2, 4, 6, 8}


def test_the_largest_network_grows():
    settings = SamplingSettings(start_macs=1e6, largest_macs=1e8, growth=0.5)
    assert largest_macs(0.0, settings) == pytest.approx(1e6)
    assert largest_macs(0.25, settings) == pytest.approx(1e7)
    assert largest_macs(0.9, settings) == 1e8


def test_limits_that_let_nothing_pass_are_an_error():
    settings = SamplingSettings(largest_macs=1.0, start_macs=1.0)
    with pytest.raises(TrainingError):
        NetworkStream(SmallArchitecture, settings).take(1, 1.0)


def test_a_candidate_that_cannot_be_made_is_left_out():
    def source(index):
        if index == 1:
            raise InvalidOptionError("no such network")
        return SmallArchitecture(index)

    assert numbers(NetworkStream(source, WIDE_OPEN), 3) == [0, 2, 3]


def test_a_prepared_network_uses_no_memory_for_weights():
    network = prepare_network(0, SmallArchitecture(0), CONFIG, torch.device("cpu"))
    assert all(parameter.is_meta for parameter in network.module.parameters())
    assert network.constants == {}


def test_a_drawn_pool_has_the_networks_of_the_pool_and_is_drawn_once(tmp_path, monkeypatch):
    pool = Pool("broad", CANONICAL, 6)
    drawn = DrawnPool(pool, tmp_path, workers=1)
    monkeypatch.setattr(DrawnPool, "_draw", lambda *_: pytest.fail("drawn again"))
    again = DrawnPool(pool, tmp_path, workers=1)
    for index in range(8):
        assert drawn(index) == again(index) == pool(index)
        assert multiply_adds(again(index)) == pool(index).multiply_adds


@pytest.mark.parametrize("content", [b"", b"{}", b"\x1f\x8b broken"])
def test_a_broken_file_of_a_pool_is_made_anew(tmp_path, content):
    pool = Pool("train", CANONICAL, 2)
    path = DrawnPool(pool, tmp_path, workers=1).path
    path.write_bytes(content)
    assert DrawnPool(pool, tmp_path, workers=1)(1) == pool(1)


def test_a_pool_of_another_generator_is_made_anew(tmp_path):
    pool = Pool("train", CANONICAL, 2)
    path = DrawnPool(Pool("broad", CANONICAL, 2), tmp_path, workers=1).path
    path.rename(tmp_path / path.name.replace("broad", "train"))
    assert DrawnPool(pool, tmp_path, workers=1)(0) == pool(0)
