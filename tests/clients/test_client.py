"""``GHNClient`` and ``Prediction`` against a real server with a fake hypernetwork."""

from __future__ import annotations

import multiprocessing
import pickle
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

from ghn_client import GHNClient, Prediction, export_architecture
from ghn_client.errors import (
    AuthenticationError,
    DeadlineExceededError,
    InvalidArchitectureError,
    InvalidOptionError,
    LimitExceededError,
    LoadError,
    OverloadedError,
    PredictionFileError,
    ServerError,
    ServerUnavailableError,
    UnknownModelError,
)
from ghn_service import errors as service_errors
from ghn_service.server.app import RunningServer
from tests.clients.small_modules import EXAMPLES, IMAGE, Attention, ConvNet, Tied, randomized
from tests.clients.test_export import run_onnx
from tests.clients.test_structure import exported_by_torch
from tests.server.fake_predictor import FakePredictor, Gate, fake_server, raises
from tests.server.small_models import TINY


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with fake_server(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[GHNClient]:
    with GHNClient(server.address) as connected:
        yield connected


# ---- predictions ----------------------------------------------------------------------------------------------------


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


def test_the_seed_decides_the_values(client: GHNClient) -> None:
    assert client.predict(TINY, seed=1).buffer == client.predict(TINY, seed=1).buffer
    assert client.predict(TINY, seed=1).buffer != client.predict(TINY, seed=2).buffer


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_element_type_is_what_was_asked_for(dtype: str, client: GHNClient) -> None:
    prediction = client.predict(TINY, dtype=dtype)
    assert {tensor.dtype for tensor in prediction.values()} == {getattr(torch, dtype)}


def test_patterns_choose_tensors(client: GHNClient) -> None:
    assert list(client.predict(TINY, include=["*.0.*"])) == ["layers.0.weight", "layers.0.bias"]


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
    assert client.server_info().limits["max_nodes"] > 0
    assert client.health().alive
    assert client.health().ready
    assert "noise" in client.steps()


# ---- files ----------------------------------------------------------------------------------------------------------


def test_a_saved_prediction_reads_back(client: GHNClient, tmp_path: Path) -> None:
    prediction = client.predict(ConvNet(), IMAGE, dtype="bfloat16")
    prediction.save(tmp_path / "weights.safetensors")
    loaded = Prediction.load(tmp_path / "weights.safetensors")
    assert loaded.buffer == prediction.buffer
    assert loaded.metadata == prediction.metadata
    assert all(torch.equal(loaded[name], prediction[name]) for name in prediction)
    by_library = load_file(tmp_path / "weights.safetensors")
    assert all(torch.equal(by_library[name], prediction[name]) for name in prediction)


def test_a_saved_file_has_the_usual_permissions_and_no_part_beside_it(client: GHNClient, tmp_path: Path) -> None:
    client.predict(TINY).save(tmp_path / "weights.safetensors")
    (tmp_path / "ordinary").touch()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["ordinary", "weights.safetensors"]
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_a_failed_write_leaves_the_earlier_file(client: GHNClient, tmp_path: Path) -> None:
    target = tmp_path / "weights.safetensors"
    target.write_bytes(b"earlier")
    prediction = client.predict(TINY)
    (tmp_path / "folder").mkdir()
    with pytest.raises(PredictionFileError):
        prediction.save(tmp_path / "missing" / "weights.safetensors")
    with pytest.raises(PredictionFileError):
        prediction.save(tmp_path / "folder")
    assert target.read_bytes() == b"earlier"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "weights.safetensors"]


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: b"", lambda data: data[8:], lambda data: b"x" * 9]
)
def test_a_damaged_file_is_refused(damage: object, client: GHNClient, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(damage(bytes(client.predict(TINY).buffer)))
    with pytest.raises(PredictionFileError):
        Prediction.load(path)


# ---- filled ONNX ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("name", ["conv", "attention", "auxiliary"])
def test_a_users_file_filled_computes_with_the_prediction(
    name: str, folded: bool, client: GHNClient, tmp_path: Path
) -> None:
    original = exported_by_torch(name, folded=folded)
    prediction = client.predict(original)
    prediction.to_onnx(tmp_path / "filled.onnx")
    filled = onnx.load(tmp_path / "filled.onnx")
    onnx.checker.check_model(filled, full_check=True)
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in filled.graph.initializer}
    for key, tensor in prediction.items():
        assert numpy.array_equal(values[key], tensor.numpy())
    x = torch.rand(EXAMPLES[name][1].shape, generator=torch.Generator().manual_seed(3))
    assert numpy.isfinite(run_onnx(filled, x)).all()


@pytest.mark.parametrize("name", ["conv", "attention", "tied", "constants"])
def test_a_modules_file_computes_what_the_loaded_module_computes(name: str, client: GHNClient, tmp_path: Path) -> None:
    build, example = EXAMPLES[name]
    module = randomized(build()).eval()
    prediction = client.predict(module, example)
    prediction.load_into(module)
    prediction.to_onnx(tmp_path / "filled.onnx")
    x = torch.rand(example.shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = module(x).numpy()
    outputs = run_onnx(onnx.load(tmp_path / "filled.onnx"), x)
    assert numpy.allclose(outputs, expected, rtol=1e-3, atol=1e-3 * numpy.abs(expected).max())


def test_a_module_on_meta_gives_a_file_with_initial_statistics(client: GHNClient, tmp_path: Path) -> None:
    with torch.device("meta"):
        module = ConvNet()
    client.predict(module, IMAGE).to_onnx(tmp_path / "filled.onnx")
    values = {
        item.name: onnx.numpy_helper.to_array(item) for item in onnx.load(tmp_path / "filled.onnx").graph.initializer
    }
    assert (values["bn1.running_mean"] == 0).all()
    assert (values["bn1.running_var"] == 1).all()


def test_merged_tensors_get_one_value_per_use(client: GHNClient, tmp_path: Path) -> None:
    program = torch.onnx.export(Attention().eval(), (EXAMPLES["attention"][1],), dynamo=True, verbose=False)
    original = program.model_proto.SerializeToString()
    prediction = client.predict(original)
    redirected = [note for note in prediction.metadata.tensors if note.uses]
    prediction.to_onnx(tmp_path / "filled.onnx")
    filled = onnx.load(tmp_path / "filled.onnx")
    onnx.checker.check_model(filled, full_check=True)
    nodes = {node.name: node for node in filled.graph.node}
    values = {item.name: onnx.numpy_helper.to_array(item) for item in filled.graph.initializer}
    assert redirected
    for note in redirected:
        for use in note.uses:
            assert numpy.array_equal(values[nodes[use.node].input[use.input_index]], prediction[note.name].numpy())


def test_weights_that_nodes_produce_become_initializers(client: GHNClient, tmp_path: Path) -> None:
    path = Path(onnx.__file__).parent / "backend/test/data/light/light_squeezenet.onnx"
    client.predict(path).to_onnx(tmp_path / "filled.onnx")
    filled = onnx.load(tmp_path / "filled.onnx")
    onnx.checker.check_model(filled, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(filled.SerializeToString(), options)
    (info,) = session.get_inputs()
    assert session.run(None, {info.name: numpy.ones(info.shape, numpy.float32)})[0].size == 1000


def test_tensors_beside_the_model_are_read_and_kept(client: GHNClient, tmp_path: Path) -> None:
    original = onnx.load_model_from_string(exported_by_torch("conv", folded=False))
    before = {item.name: onnx.numpy_helper.to_array(item) for item in original.graph.initializer}
    onnx.save_model(original, tmp_path / "a.onnx", save_as_external_data=True, location="a.data", size_threshold=0)
    prediction = client.predict(tmp_path / "a.onnx")
    prediction.to_onnx(tmp_path / "b.onnx")
    (tmp_path / "a.data").unlink()
    filled = {item.name: onnx.numpy_helper.to_array(item) for item in onnx.load(tmp_path / "b.onnx").graph.initializer}
    assert numpy.array_equal(filled["bn1.running_mean"], before["bn1.running_mean"])
    assert not numpy.array_equal(filled["conv1.weight"], before["conv1.weight"])


def test_large_files_keep_their_tensors_beside_them(
    client: GHNClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ghn_client.fill.EXTERNAL_BYTES", 100)
    prediction = client.predict(ConvNet(), IMAGE)
    prediction.to_onnx(tmp_path / "filled.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["filled.onnx", "filled.onnx.data"]
    values = {
        item.name: onnx.numpy_helper.to_array(item) for item in onnx.load(tmp_path / "filled.onnx").graph.initializer
    }
    assert all(numpy.array_equal(values[name], tensor.numpy()) for name, tensor in prediction.items())


def test_a_loaded_prediction_needs_the_model_to_fill(client: GHNClient, tmp_path: Path) -> None:
    client.predict(TINY).save(tmp_path / "weights.safetensors")
    loaded = Prediction.load(tmp_path / "weights.safetensors")
    with pytest.raises(LoadError):
        loaded.to_onnx(tmp_path / "filled.onnx")
    loaded.to_onnx(tmp_path / "filled.onnx", model=TINY)
    assert (tmp_path / "filled.onnx").exists()


def test_weights_of_another_model_are_refused(client: GHNClient, tmp_path: Path) -> None:
    prediction = client.predict(TINY)
    with pytest.raises(LoadError):
        prediction.to_onnx(tmp_path / "filled.onnx", model=exported_by_torch("conv", folded=False))
    assert not list(tmp_path.iterdir())


# ---- causes of failure ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"model": "nothing"}, UnknownModelError),
        ({"dtype": "float8"}, InvalidOptionError),
        ({"seed": -1}, InvalidOptionError),
        ({"seed": 2**64}, InvalidOptionError),
        ({"steps": ["sharpen"]}, InvalidOptionError),
        ({"steps": ["noise:beta"]}, InvalidOptionError),
        ({"low_rank": {}}, InvalidOptionError),
        ({"low_rank": {"rank": 1, "energy": 0.5}}, InvalidOptionError),
        ({"low_rank": {"ranks": 1}}, InvalidOptionError),
        ({"include": ["nothing*"]}, InvalidOptionError),
        ({"timeout_s": -1.0}, InvalidOptionError),
    ],
)
def test_impossible_options_have_their_own_errors(options: dict, error: type[Exception], client: GHNClient) -> None:
    with pytest.raises(error):
        client.predict(TINY, **options)


def test_bytes_that_are_no_model_are_refused_here(client: GHNClient) -> None:
    with pytest.raises(InvalidArchitectureError):
        client.predict(b"nothing")


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (service_errors.PredictionError("NaN"), ServerError),
        (RuntimeError("a bug"), ServerError),
        (service_errors.LimitExceededError("too large"), LimitExceededError),
        (service_errors.InvalidArchitectureError("odd"), InvalidArchitectureError),
    ],
)
def test_failures_of_the_server_have_their_own_errors(
    raised: Exception, expected: type[Exception], tmp_path: Path
) -> None:
    with fake_server(tmp_path, FakePredictor(raises(raised))) as server, GHNClient(server.address) as client:
        with pytest.raises(expected) as caught:
            client.predict(TINY)
        assert caught.value.request_id


def test_a_reply_larger_than_accepted_is_refused(server: RunningServer) -> None:
    with GHNClient(server.address, max_bytes=100) as client, pytest.raises(LimitExceededError):
        client.predict(TINY)


def test_the_deadline_ends_a_call(tmp_path: Path) -> None:
    gate = Gate()
    with fake_server(tmp_path, FakePredictor(gate)) as server, GHNClient(server.address) as client:
        with pytest.raises(DeadlineExceededError):
            client.predict(TINY, timeout_s=0.3)
        gate.opened.set()


def test_an_absent_server_is_unavailable() -> None:
    with GHNClient("localhost:1", max_attempts=1) as client:
        with pytest.raises(ServerUnavailableError):
            client.predict(TINY)
        assert not client.health().alive


def test_a_server_that_comes_late_is_waited_for(tmp_path: Path) -> None:
    with fake_server(tmp_path) as first:
        address = first.address
    port = int(address.rpartition(":")[2])
    client = GHNClient(address, timeout_s=30.0, max_attempts=6)
    with pytest.raises(ServerUnavailableError):
        GHNClient(address, max_attempts=1).predict(TINY)
    with fake_server(tmp_path, port=port):
        assert len(client.predict(TINY)) == 6


def test_a_busy_server_is_asked_again(tmp_path: Path) -> None:
    failures = [service_errors.OverloadedError("busy")] * 2

    def busy_at_first(on_stage: object) -> None:
        if failures:
            raise failures.pop()

    with fake_server(tmp_path, FakePredictor(busy_at_first)) as server, GHNClient(server.address) as client:
        assert len(client.predict(TINY)) == 6


def test_a_server_that_stays_busy_is_given_up(tmp_path: Path) -> None:
    predictor = FakePredictor(raises(service_errors.OverloadedError("busy")))
    with fake_server(tmp_path, predictor) as server, GHNClient(server.address, max_attempts=2) as client:
        with pytest.raises(OverloadedError):
            client.predict(TINY)
        assert predictor.num_runs == 2


def test_a_refusal_is_not_repeated(tmp_path: Path) -> None:
    predictor = FakePredictor(raises(service_errors.InvalidArchitectureError("odd")))
    with fake_server(tmp_path, predictor) as server, GHNClient(server.address) as client:
        with pytest.raises(InvalidArchitectureError):
            client.predict(TINY)
        assert predictor.num_runs == 1


# ---- addresses, tokens, processes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["gpu-server:50051", "dns:///gpu-server:50051", "10.0.0.1:50051"])
def test_a_token_does_not_travel_in_plain_text(address: str) -> None:
    with pytest.raises(AuthenticationError):
        GHNClient(address, token="secret")


@pytest.mark.parametrize(
    "address", ["localhost:1", "127.0.0.1:1", "[::1]:1", "unix:/tmp/socket", "dns:///localhost:1", "ipv4:127.0.0.1:1"]
)
def test_a_token_may_go_to_this_machine(address: str) -> None:
    GHNClient(address, token="secret").close()


def test_a_token_may_travel_encrypted() -> None:
    GHNClient("gpu-server:50051", token="secret", tls=True).close()


def test_an_empty_address_is_refused() -> None:
    with pytest.raises(InvalidOptionError):
        GHNClient(" ")


def test_a_missing_certificate_is_an_authentication_error(tmp_path: Path) -> None:
    with GHNClient("localhost:1", root_certificates=tmp_path / "ca.pem") as client, pytest.raises(AuthenticationError):
        client.predict(TINY)


def test_a_client_can_be_used_again_after_close(server: RunningServer) -> None:
    client = GHNClient(server.address)
    for _ in range(2):
        assert len(client.predict(TINY)) == 6
        client.close()


def predict_in_child(client: GHNClient, results: multiprocessing.Queue) -> None:
    results.put(bytes(client.predict(TINY, timeout_s=20).buffer))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_another_process_may_use_the_client(method: str, client: GHNClient) -> None:
    expected = bytes(client.predict(TINY).buffer)
    context = multiprocessing.get_context(method)
    results = context.Queue()
    child = context.Process(target=predict_in_child, args=(client, results))
    child.start()
    assert results.get(timeout=60) == expected
    child.join()
    assert child.exitcode == 0
    assert bytes(client.predict(TINY).buffer) == expected


def test_a_client_can_be_pickled(client: GHNClient) -> None:
    assert pickle.loads(pickle.dumps(client)).predict(TINY).buffer == client.predict(TINY).buffer


def test_structure_of_an_export_is_a_prediction_of_the_module(client: GHNClient) -> None:
    module = Tied()
    data = export_architecture(module, torch.zeros(2, 6))
    assert set(client.predict(data)) == {name for name, _ in module.named_parameters()}
