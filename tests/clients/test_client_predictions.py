"""What ``GHNClient`` answers, against a real server with a fake hypernetwork."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from ghn_client import GHNClient, export_architecture
from tests.clients.small_modules import EXAMPLES, Attention, Tied
from tests.server.small_models import TINY


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_module_gets_every_parameter(name: str, device: str, client: GHNClient) -> None:
    build, example = EXAMPLES[name]
    with torch.device(device):
        module = build()
        if name == "constants":
            module.spread = torch.ones(1, 3, 1, 1, device="cpu")
            module.mean = torch.ones(1, 3, 1, 1, device="cpu")
    prediction = client.predict(module, example)
    report = prediction.load_into(module)
    assert report.is_complete
    for key, tensor in prediction.state_dict().items():
        assert torch.equal(module.state_dict()[key], tensor)


def test_a_transposed_weight_of_a_file_loads_in_torchs_layout(client: GHNClient) -> None:
    program = torch.onnx.export(Attention().eval(), (EXAMPLES["attention"][1],), dynamo=True, verbose=False)
    prediction = client.predict(program.model_proto.SerializeToString())
    turned = [note for note in prediction.metadata.tensors if note.permutation == (1, 0) and note.torch_name]
    assert turned
    module = Attention()
    report = prediction.load_into(module, strict=False)
    assert not report.mismatched
    for note in turned:
        assert torch.equal(module.get_parameter(note.torch_name), prediction[note.name].T)


def test_path_and_bytes_give_the_same_prediction(client: GHNClient, tmp_path: Path) -> None:
    (tmp_path / "tiny.onnx").write_bytes(TINY)
    assert client.predict(tmp_path / "tiny.onnx").buffer == client.predict(TINY).buffer
    assert client.predict(str(tmp_path / "tiny.onnx")).buffer == client.predict(TINY).buffer


def test_threads_may_share_a_client(client: GHNClient) -> None:
    build, example = EXAMPLES["attention"]
    alone = client.predict(build(), example).buffer
    with ThreadPoolExecutor(4) as pool:
        assert all(item.buffer == alone for item in pool.map(lambda _: client.predict(build(), example), range(4)))


def test_a_dtype_may_be_that_of_torch(client: GHNClient) -> None:
    prediction = client.predict(TINY, dtype=torch.bfloat16)
    assert prediction.buffer == client.predict(TINY, dtype="bfloat16").buffer
    assert {tensor.dtype for tensor in prediction.values()} == {torch.bfloat16}


def test_the_seed_decides_the_values(client: GHNClient) -> None:
    assert client.predict(TINY, seed=1).buffer == client.predict(TINY, seed=1).buffer
    assert client.predict(TINY, seed=1).buffer != client.predict(TINY, seed=2).buffer


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_element_type_is_what_was_asked_for(dtype: str, client: GHNClient) -> None:
    prediction = client.predict(TINY, dtype=dtype)
    assert {tensor.dtype for tensor in prediction.values()} == {getattr(torch, dtype)}


def test_patterns_choose_tensors(client: GHNClient) -> None:
    for include in (["*.0.*"], "*.0.*"):
        assert list(client.predict(TINY, include=include)) == ["layers.0.weight", "layers.0.bias"]


def test_tensors_share_the_received_buffer(client: GHNClient) -> None:
    prediction = client.predict(TINY)
    before = bytes(prediction.buffer)
    prediction["layers.0.weight"].zero_()
    assert bytes(prediction.buffer) != before


def test_progress_is_told(client: GHNClient) -> None:
    events = []
    client.predict(TINY, on_progress=events.append)
    assert events[-1].stage == "streaming"
    assert events[-1].received_bytes == events[-1].total_bytes > 0


def test_what_a_prediction_would_do_is_told(client: GHNClient) -> None:
    analysis = client.analyze(TINY)
    assert analysis.num_parameters == 74
    assert {item.name for item in analysis.tensors} == set(client.predict(TINY))
    assert analysis.total_bytes == len(client.predict(TINY).buffer)


def test_the_server_tells_what_it_is(client: GHNClient) -> None:
    (model,) = client.models()
    assert (model.name, model.is_default) == ("fake", True)
    assert client.server_info().devices == ("cpu",)
    limits = client.server_info().limits
    assert limits["max_nodes"] > limits["max_graph_nodes"] > 0
    assert client.health().alive
    assert client.health().ready
    assert "noise" in client.steps()


def test_structure_of_an_export_is_a_prediction_of_the_module(client: GHNClient) -> None:
    module = Tied()
    data = export_architecture(module, torch.zeros(2, 6))
    assert set(client.predict(data)) == {name for name, _ in module.named_parameters()}
