"""Weights that are decoded in bfloat16 are nearly those of float32; vectors are the same."""

from __future__ import annotations

import pytest
import torch

from ghn_architectures.registry import build_network
from ghn_client import GHNClient
from ghn_client.onnx.export import export_architecture
from ghn_service.predictor import Predictor
from ghn_service.published import BUNDLED_CHECKPOINTS

CHECKPOINT = BUNDLED_CHECKPOINTS / "ghn-cifar10.safetensors"


@pytest.fixture(scope="module")
def architecture() -> bytes:
    return export_architecture(build_network("resnet20", num_classes=10), torch.zeros(1, 3, 32, 32))


def test_bfloat16_deviates_by_about_one_part_in_a_hundred(architecture: bytes) -> None:
    exact = Predictor.from_checkpoint(CHECKPOINT, device="cpu").predict(architecture)
    predictor = Predictor.from_checkpoint(CHECKPOINT, device="cpu", compute_dtype="bfloat16")
    found = predictor.predict(architecture)
    assert {value.dtype for value in found.values()} == {torch.float32}
    for name, value in exact.items():
        if value.dim() < 2:
            torch.testing.assert_close(found[name], value, rtol=0, atol=0)
        else:
            assert 0 < (found[name] - value).norm() / value.norm() < 0.03, name
    matrices = predictor.ghn.decoder.parameters()
    assert torch.bfloat16 in {parameter.dtype for parameter in matrices}


def test_a_server_computes_as_it_is_set(architecture: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Predictor.from_checkpoint(CHECKPOINT, device="cpu", compute_dtype="bfloat16").predict(architecture)
    monkeypatch.setenv("GHN_COMPUTE_DTYPE", "bfloat16")
    monkeypatch.setenv("GHN_DEVICE", "cpu")
    with GHNClient.embedded(CHECKPOINT) as client:
        found = client.predict(architecture)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)
