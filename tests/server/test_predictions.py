"""Whole predictions through a socket, with the fake predictor: what is in a stream, and what may not change."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import safetensors.torch
import torch
from crc32c import crc32c

from ghn_client.wire import ghn_pb2, ghn_pb2_grpc
from ghn_client.wire.metadata import decode_metadata
from ghn_service.server.app import RunningServer
from tests.server.fake_predictor import SUMMARY, connect, fake_server, predict_request, receive_file
from tests.server.safetensors_files import read_file
from tests.server.small_models import LARGE, TINY


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with fake_server(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def stub(server: RunningServer) -> Iterator[ghn_pb2_grpc.GhnServiceStub]:
    with connect(server) as connected:
        yield connected


def test_events_come_in_order(stub: ghn_pb2_grpc.GhnServiceStub) -> None:
    kinds = [event.WhichOneof("event") for event in stub.PredictWeights(predict_request(TINY))]
    without_progress = [kind for kind in kinds if kind != "progress"]
    assert without_progress == ["header", "chunk", "trailer"]
    assert kinds[0] == "progress"


def test_the_chunks_are_a_safetensors_file(stub: ghn_pb2_grpc.GhnServiceStub) -> None:
    tensors = safetensors.torch.load(receive_file(stub.PredictWeights(predict_request(TINY))))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes == {
        "layers.0.weight": (5, 6),
        "layers.0.bias": (5,),
        "layers.1.weight": (4, 5),
        "layers.1.bias": (4,),
        "layers.2.weight": (3, 4),
        "layers.2.bias": (3,),
    }


def test_the_announced_size_is_that_of_the_file(stub: ghn_pb2_grpc.GhnServiceStub) -> None:
    events = list(stub.PredictWeights(predict_request(TINY)))
    (header,) = (event.header for event in events if event.WhichOneof("event") == "header")
    assert header.total_bytes == len(receive_file(events))


def test_a_dry_run_tells_the_size_of_the_reply(stub: ghn_pb2_grpc.GhnServiceStub) -> None:
    architecture = ghn_pb2.Architecture(onnx_model=TINY)
    request = ghn_pb2.AnalyzeArchitectureRequest(architecture=architecture, dtype=ghn_pb2.DATA_TYPE_FLOAT16)
    size = len(receive_file(stub.PredictWeights(predict_request(TINY, dtype=ghn_pb2.DATA_TYPE_FLOAT16))))
    assert stub.AnalyzeArchitecture(request).total_bytes == size


def test_every_chunk_has_its_checksum(stub: ghn_pb2_grpc.GhnServiceStub) -> None:
    events = stub.PredictWeights(predict_request(LARGE))
    chunks = [event.chunk for event in events if event.WhichOneof("event") == "chunk"]
    assert all(chunk.crc32c == crc32c(chunk.data) for chunk in chunks)


def test_chunks_are_a_mebibyte_and_gapless(stub: ghn_pb2_grpc.GhnServiceStub) -> None:
    events = stub.PredictWeights(predict_request(LARGE))
    chunks = [event.chunk for event in events if event.WhichOneof("event") == "chunk"]
    assert [chunk.offset for chunk in chunks] == [index << 20 for index in range(len(chunks))]
    assert {len(chunk.data) for chunk in chunks[:-1]} == {1 << 20}


def test_the_trailer_tells_where_the_time_went(stub: ghn_pb2_grpc.GhnServiceStub) -> None:
    *_, last = stub.PredictWeights(predict_request(TINY))
    assert {"waiting", "reading", "encoding", "decoding", "streaming"} <= set(last.trailer.seconds)


def test_the_same_request_gives_the_same_bytes(stub: ghn_pb2_grpc.GhnServiceStub) -> None:
    first, second = (receive_file(stub.PredictWeights(predict_request(TINY, seed=3))) for _ in range(2))
    assert first == second


def test_the_request_id_is_not_in_the_bytes(stub: ghn_pb2_grpc.GhnServiceStub) -> None:
    files = {receive_file(stub.PredictWeights(predict_request(TINY, request_id=name))) for name in ("a", "b")}
    assert len(files) == 1


def test_another_seed_gives_other_values(stub: ghn_pb2_grpc.GhnServiceStub) -> None:
    first, second = (
        safetensors.torch.load(receive_file(stub.PredictWeights(predict_request(TINY, seed=seed)))) for seed in (1, 2)
    )
    assert not torch.equal(first["layers.0.weight"], second["layers.0.weight"])


@pytest.mark.parametrize(
    ("wanted", "dtype"),
    [
        (ghn_pb2.DATA_TYPE_UNSPECIFIED, torch.float32),
        (ghn_pb2.DATA_TYPE_FLOAT32, torch.float32),
        (ghn_pb2.DATA_TYPE_FLOAT16, torch.float16),
        (ghn_pb2.DATA_TYPE_BFLOAT16, torch.bfloat16),
    ],
)
def test_the_element_type_is_the_one_asked_for(
    stub: ghn_pb2_grpc.GhnServiceStub, wanted: ghn_pb2.DataType.ValueType, dtype: torch.dtype
) -> None:
    tensors = safetensors.torch.load(receive_file(stub.PredictWeights(predict_request(TINY, dtype=wanted))))
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}


def test_patterns_choose_tensors(stub: ghn_pb2_grpc.GhnServiceStub) -> None:
    file = receive_file(stub.PredictWeights(predict_request(TINY, include=["*.bias", "layers.0.*"])))
    assert set(safetensors.torch.load(file)) == {
        "layers.0.weight",
        "layers.0.bias",
        "layers.1.bias",
        "layers.2.bias",
    }


def test_the_file_says_how_it_was_made(stub: ghn_pb2_grpc.GhnServiceStub) -> None:
    file = receive_file(stub.PredictWeights(predict_request(TINY, seed=2**64 - 1, include=["*.bias"])))
    encoded = read_file(file).metadata
    metadata = decode_metadata(encoded)
    assert encoded["format"] == "pt"
    assert (metadata.model, metadata.model_digest) == ("fake", SUMMARY.digest)
    assert (metadata.seed, metadata.dtype, metadata.include) == (2**64 - 1, "float32", ("*.bias",))
    assert [note.name for note in metadata.tensors] == ["layers.0.bias", "layers.1.bias", "layers.2.bias"]
    assert set(metadata.versions) == {"ghn-service", "torch"}


def test_the_header_has_the_identifier(stub: ghn_pb2_grpc.GhnServiceStub) -> None:
    events = list(stub.PredictWeights(predict_request(TINY, request_id="mine", seed=5)))
    (header,) = (event.header for event in events if event.WhichOneof("event") == "header")
    assert header.request_id == "mine"


def test_a_dry_run_lists_every_tensor(stub: ghn_pb2_grpc.GhnServiceStub) -> None:
    request = ghn_pb2.AnalyzeArchitectureRequest(architecture=ghn_pb2.Architecture(onnx_model=TINY), request_id="dry")
    answer = stub.AnalyzeArchitecture(request)
    assert answer.request_id == "dry"
    assert answer.num_parameters == 6 * 5 + 5 + 5 * 4 + 4 + 4 * 3 + 3
    assert {tuple(tensor.shape) for tensor in answer.tensors} == {(5, 6), (5,), (4, 5), (4,), (3, 4), (3,)}
    assert sum(answer.op_type_counts.values()) == answer.num_nodes


def test_list_models_describes_the_checkpoint(stub: ghn_pb2_grpc.GhnServiceStub) -> None:
    answer = stub.ListModels(ghn_pb2.ListModelsRequest())
    (model,) = answer.models
    assert (model.name, model.digest, model.is_default) == ("fake", SUMMARY.digest, True)
    assert (model.num_parameters, model.dataset, model.device) == (12_345, "none", "cpu")
    assert "noise" in answer.steps


def test_server_info_tells_the_limits(stub: ghn_pb2_grpc.GhnServiceStub, server: RunningServer) -> None:
    answer = stub.GetServerInfo(ghn_pb2.GetServerInfoRequest())
    assert answer.torch_version == torch.__version__
    assert answer.limits.max_parameters == server.settings.max_parameters
    assert list(answer.devices) == ["cpu"]
