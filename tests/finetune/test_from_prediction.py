"""From architecture to tuned network: predict, load, recalibrate, tune, save, and make it again from its request."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ghn_client import GHNClient
from ghn_client.cli.app import app
from ghn_client.finetune import load_complete_model
from ghn_service.hypernetwork.checkpoint import ModelCard, save_checkpoint
from tests.finetune.networks import ResidualNetwork
from tests.hypernetwork.small_graphs import small_ghn


@pytest.mark.filterwarnings("ignore")
def test_a_delta_of_the_command_line_is_a_complete_model(tmp_path):
    image = pytest.importorskip("PIL.Image")
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for label, name in enumerate(("ant", "bee")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for index in range(8):
                pixels = (40 + 100 * label + 20 * generator.random((8, 8, 3))).astype(np.uint8)
                image.fromarray(pixels).save(folder / f"{index}.png")
    checkpoint = tmp_path / "ghn.safetensors"
    save_checkpoint(small_ghn(), checkpoint, card=ModelCard(dataset="made up"))
    result = CliRunner().invoke(
        app,
        [
            "finetune", "tests.finetune.networks:ResidualNetwork", "--data", str(tmp_path / "images"),
            "--checkpoint", str(checkpoint), "--image-size", "8", "--epochs", "2", "--seed", "3", "--json",
            "-o", str(tmp_path / "delta.safetensors"), "--model-out", str(tmp_path / "model.safetensors"),
        ],
        catch_exceptions=False,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["request"]["seed"] == 3

    def predict(request):
        with GHNClient.embedded(checkpoint) as client:
            module = ResidualNetwork()
            client.predict(module, torch.zeros(1, 3, 8, 8), seed=request["seed"]).load_into(module)
        return dict(module.named_parameters())

    again = load_complete_model(ResidualNetwork(), tmp_path / "delta.safetensors", predict).merge().state_dict()
    from safetensors.torch import load_file

    whole = load_file(str(tmp_path / "model.safetensors"))
    assert all(torch.equal(whole[name], value) for name, value in again.items() if not name.endswith("tracked"))
