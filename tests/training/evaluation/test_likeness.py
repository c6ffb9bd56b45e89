"""Likeness of layers of one role: 1 for copies, 0 for random layers, and roles are told apart."""

from __future__ import annotations

import math

import pytest

from ghn_architectures.registry import reference_architecture
from ghn_service.training.evaluation.zero_shot import he_module, layers_and_width, likeness

ARCHITECTURE = reference_architecture("resnet20")


def test_depth_and_width_of_resnet20():
    assert layers_and_width(ARCHITECTURE.graph()) == (22, 16)  # with two shortcuts


def test_random_layers_are_not_alike():
    tensors = dict(he_module(ARCHITECTURE, seed=0).named_parameters())
    assert likeness(ARCHITECTURE.graph(), tensors) == pytest.approx(0.0, abs=0.02)


def test_equal_blocks_are_alike_whatever_their_layers_are():
    tensors = dict(he_module(ARCHITECTURE, seed=0).named_parameters())
    for name in list(tensors):
        stage, _, rest = name.removeprefix("stages.").partition(".")
        block, _, layer = rest.partition(".")
        if name.startswith("stages.") and block == "2":
            tensors[f"stages.{stage}.0.{layer}"] = tensors[f"stages.{stage}.1.{layer}"] = tensors[name]
    assert likeness(ARCHITECTURE.graph(), tensors) == pytest.approx(1.0, abs=1e-4)


def test_a_network_without_repetition_has_none():
    architecture = reference_architecture("mlp")
    assert math.isnan(likeness(architecture.graph(), dict(architecture.build().named_parameters())))
