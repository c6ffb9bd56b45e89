"""ONNX files with the predicted weights in them: a user's own, and those exported from a module."""

from __future__ import annotations

from pathlib import Path

import numpy
import onnx
import onnxruntime
import pytest
import torch

from ghn_client import GHNClient, Prediction
from ghn_client.errors import LoadError
from ghn_client.onnx.edit import read_model
from tests.clients.small_modules import EXAMPLES, IMAGE, Attention, ConvNet, randomized
from tests.clients.test_export import run_onnx
from tests.clients.test_structure import exported_by_torch
from tests.server.small_models import TINY


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
    monkeypatch.setattr("ghn_client.onnx.edit.EXTERNAL_BYTES", 100)
    prediction = client.predict(ConvNet(), IMAGE)
    prediction.to_onnx(tmp_path / "filled.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["filled.onnx", "filled.onnx.data"]
    values = {
        item.name: onnx.numpy_helper.to_array(item) for item in onnx.load(tmp_path / "filled.onnx").graph.initializer
    }
    assert all(numpy.array_equal(values[name], tensor.numpy()) for name, tensor in prediction.items())


def test_large_tensors_lie_beside_the_file_that_a_link_leads_to(
    client: GHNClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ghn_client.onnx.edit.EXTERNAL_BYTES", 100)
    (tmp_path / "store").mkdir()
    link, target = tmp_path / "link.onnx", tmp_path / "store" / "model.onnx"
    link.symlink_to(target)
    prediction = client.predict(ConvNet(), IMAGE)
    prediction.to_onnx(link)
    assert link.is_symlink()
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["link.onnx", "model.onnx", "model.onnx.data"]
    for model in (onnx.load(target), read_model(link)):
        values = {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}
        assert all(numpy.array_equal(values[name], tensor.numpy()) for name, tensor in prediction.items())
    client.predict(link).to_onnx(tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx.data").exists()


def test_a_file_is_found_again_from_another_folder_and_missed_when_it_is_gone(
    client: GHNClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "tiny.onnx").write_bytes(TINY)
    monkeypatch.chdir(tmp_path)
    prediction = client.predict("tiny.onnx")
    monkeypatch.chdir(tmp_path / "folder")
    prediction.to_onnx("filled.onnx")
    assert (tmp_path / "folder" / "filled.onnx").exists()
    (tmp_path / "tiny.onnx").unlink()
    with pytest.raises(LoadError):
        prediction.to_onnx("again.onnx")


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
