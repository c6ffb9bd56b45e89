from __future__ import annotations

import dataclasses
import json

import pytest

from ghn_service.errors import CheckpointError
from ghn_service.hypernetwork.config import GHNConfig, decode_config, encode_config
from tests.hypernetwork.small_graphs import CONFIGS


@pytest.mark.parametrize(
    "change",
    [
        {"encoder": "mlp"},
        {"decoder": "mlp"},
        {"kernel_crop": "left"},
        {"hidden_channels": 0},
        {"hidden_channels": 18},
        {"hidden_channels": 10**9},
        {"num_layers": 10**9},
        {"num_heads": 5},
        {"num_classes": 0},
        {"num_classes": 2.5},
        {"distance_cutoff": 255},
        {"max_shape": (8, 8, 5)},
        {"max_shape": (8, 8, 0, 5)},
        {"op_types": ("conv", "conv", "input")},
        {"op_types": ("conv",)},
    ],
    ids=str,
)
def test_impossible_values_are_refused(change):
    with pytest.raises(CheckpointError):
        GHNConfig(**change)


@pytest.mark.parametrize("kind", CONFIGS)
def test_json_round_trip(kind):
    config = CONFIGS[kind]
    assert decode_config(json.loads(json.dumps(encode_config(config)))) == config
    assert config.kind == kind


@pytest.mark.parametrize("values", [{"newer_option": 1}, {"max_shape": 8}, {"op_types": 3}, [1]], ids=str)
def test_foreign_json_is_refused(values):
    with pytest.raises(CheckpointError):
        decode_config(values)


def test_vocabulary_is_stored_by_name():
    config = dataclasses.replace(GHNConfig(), op_types=("input", "conv", "bias"))
    assert encode_config(config)["op_types"] == ["input", "conv", "bias"]
