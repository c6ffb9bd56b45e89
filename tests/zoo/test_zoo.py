"""Public networks from module to one training step on predicted weights."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ghn_client import GHNClient, export_architecture
from ghn_service.hypernetwork.import_checkpoint import import_checkpoint
from tests.shared_data import shared_path
from tests.zoo.conftest import ROWS_KEY
from tests.zoo.networks import ZooNetwork, zoo_networks

pytestmark = pytest.mark.zoo


@pytest.fixture(scope="session")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GHNClient]:
    source = shared_path("golden/ghn3_seeded.safetensors")
    checkpoint = tmp_path_factory.mktemp("zoo") / "ghn3.safetensors"
    import_checkpoint(Path(source), checkpoint)
    with GHNClient.embedded(checkpoint) as client:
        yield client


def first_output(outputs: object) -> torch.Tensor:
    while not isinstance(outputs, torch.Tensor):
        outputs = next(iter(outputs.values())) if isinstance(outputs, dict) else outputs[0]
    return outputs


@pytest.mark.parametrize("network", zoo_networks(), ids=lambda network: f"{network.package}-{network.name}")
def test_predicted_weights_load_strictly_and_train(network: ZooNetwork, client: GHNClient, record_property) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = network.build().train()
        start = time.process_time()
        structure = export_architecture(module, network.example)
    export_s = time.process_time() - start
    start = time.process_time()
    prediction = client.predict(structure)
    predict_s = time.process_time() - start
    nodes = client.analyze(structure).num_nodes

    report = prediction.load_into(module)
    assert report.is_complete
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())
    loss = first_output(module(network.example)).square().mean()
    loss.backward()
    torch.optim.SGD(module.parameters(), lr=1e-6).step()
    assert torch.isfinite(loss)

    shares = prediction.trust.shares
    rules = {origin.removeprefix("fallback:") for origin in prediction.origins.values() if ":" in origin}
    row = {
        "package": network.package,
        "name": network.name,
        "image_size": network.image_size,
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "nodes": nodes,
        "predicted": shares["predicted"],
        "distinct": shares["predicted"] - shares["copied"],
        "rules": sorted(rules),
        "export_s": export_s,
        "predict_s": predict_s,
    }
    record_property(ROWS_KEY, json.dumps(row))
