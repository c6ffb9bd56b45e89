"""``strip_weights``: the service reads the same, and nothing of the weights or of the user's machine is left."""

from __future__ import annotations

import io
from pathlib import Path

import numpy
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from ghn_client import strip_weights
from ghn_client.errors import InvalidArchitectureError
from ghn_client.onnx.export import read_source
from ghn_client.onnx.strip import KEPT_ELEMENTS, strip_tensor
from ghn_service.graph.architecture import encode_graph
from ghn_service.graph.onnx.reader import read_onnx
from tests.clients.small_modules import EXAMPLES, IMAGE, ConvNet, randomized

LIGHT = sorted((Path(onnx.__file__).parent / "backend/test/data/light").glob("light_*.onnx"))


def exported_by_torch(name: str, *, folded: bool) -> bytes:
    """A file as users have it: from torch's older exporter, with weights."""
    build, example = EXAMPLES[name]
    buffer = io.BytesIO()
    module = randomized(build()).eval()
    torch.onnx.export(module, (example,), buffer, dynamo=False, do_constant_folding=folded)
    return buffer.getvalue()


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_service_reads_the_same_from_a_stripped_file(name: str, folded: bool) -> None:
    original = exported_by_torch(name, folded=folded)
    assert encode_graph(read_onnx(strip_weights(original))) == encode_graph(read_onnx(original))


@pytest.mark.parametrize("path", LIGHT, ids=lambda path: path.stem)
def test_files_that_compute_their_weights_read_the_same(path: Path) -> None:
    original = path.read_bytes()
    assert encode_graph(read_onnx(strip_weights(original))) == encode_graph(read_onnx(original))


def test_no_weight_is_left() -> None:
    stripped = onnx.load_model_from_string(strip_weights(exported_by_torch("conv", folded=False)))
    assert all(not tensor.raw_data for tensor in stripped.graph.initializer if len(tensor.dims) > 0)
    assert {tensor.name for tensor in stripped.graph.initializer} >= {"conv2.weight", "fc.bias"}


def test_stripping_twice_changes_nothing() -> None:
    once = strip_weights(exported_by_torch("attention", folded=True))
    assert strip_weights(once) == once


def test_traces_of_the_users_machine_are_removed() -> None:
    program = torch.onnx.export(ConvNet().eval(), (IMAGE,), dynamo=True, optimize=True, verbose=False)
    original = program.model_proto.SerializeToString()
    assert b"small_modules.py" in original
    assert b"small_modules.py" not in strip_weights(original)


def test_external_data_is_neither_opened_nor_asked_for(tmp_path: Path) -> None:
    model = onnx.load_model_from_string(exported_by_torch("conv", folded=False))
    onnx.save_model(model, tmp_path / "model.onnx", save_as_external_data=True, location="weights", size_threshold=0)
    (tmp_path / "weights").unlink()
    source = read_source(tmp_path / "model.onnx")
    stripped = onnx.load_model_from_string(source.structure)
    assert all(not tensor.external_data for tensor in stripped.graph.initializer)
    assert {spec.name for spec in read_onnx(source.structure).parameters()} >= {"conv1.weight", "fc.weight"}


@pytest.mark.parametrize("data", [b"", b"not a model", b"\x08\x07" * 50])
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidArchitectureError):
        strip_weights(data)


def test_a_missing_file_is_an_invalid_architecture(tmp_path: Path) -> None:
    with pytest.raises(InvalidArchitectureError):
        read_source(tmp_path / "nothing.onnx")


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 40), max_size=3),
    data_type=st.sampled_from([TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32, TensorProto.UINT8]),
)
def test_only_small_integers_and_single_numbers_keep_values(shape: list[int], data_type: int) -> None:
    array = numpy.zeros(shape, dtype=helper.tensor_dtype_to_np_dtype(data_type))
    tensor = onnx.numpy_helper.from_array(array, "t")
    strip_tensor(tensor)
    is_index = data_type in (TensorProto.INT64, TensorProto.INT32)
    keeps = array.size <= (KEPT_ELEMENTS if is_index else 1)
    assert bool(tensor.raw_data) == (keeps and array.size > 0)
    assert (list(tensor.dims), tensor.data_type, tensor.name) == (shape, data_type, "t")
