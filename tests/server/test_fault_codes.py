"""What goes wrong with one request has one status code; texts may change, codes may not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import onnx
import pytest
import torch
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from ghn_client.wire import ghn_pb2, ghn_pb2_grpc
from ghn_service.errors import CheckpointError, PredictionError
from ghn_service.server.app import RunningServer, start_server
from tests.server.fake_predictor import (
    FakePredictor,
    code_of,
    connect,
    fake_server,
    fake_settings,
    predict_request,
    raises,
    receive_file,
)
from tests.server.small_models import TINY, linear_model

Code = grpc.StatusCode


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    limits = {
        "max_nodes": 50,
        "max_graph_nodes": 30,
        "max_tensors": 40,
        "max_parameters": 10_000,
        "max_request_bytes": 100_000,
    }
    with fake_server(tmp_path_factory.mktemp("server"), **limits) as running:
        yield running


@pytest.fixture
def stub(server: RunningServer) -> Iterator[ghn_pb2_grpc.GhnServiceStub]:
    with connect(server) as connected:
        yield connected


def failure(call: Any) -> grpc.RpcError:
    """The error that a call ends with."""
    with pytest.raises(grpc.RpcError) as caught:
        list(call())
    return caught.value


def details(error: grpc.RpcError) -> dict[str, Any]:
    """The ``google.rpc`` details of an error, by name of their message."""
    status = rpc_status.from_call(error)
    assert status is not None
    found = {}
    for packed in status.details:
        message = getattr(error_details_pb2, packed.TypeName().rpartition(".")[2])()
        assert packed.Unpack(message)
        found[type(message).__name__] = message
    return found


def violated_field(error: grpc.RpcError) -> str:
    """The field that a ``BadRequest`` blames."""
    field: str = details(error)["BadRequest"].field_violations[0].field
    return field


@pytest.mark.parametrize("model", [b"", b"\x00\xff" * 50, TINY[: len(TINY) // 2]], ids=["empty", "random", "truncated"])
def test_bytes_that_are_no_model(stub: ghn_pb2_grpc.GhnServiceStub, model: bytes) -> None:
    error = failure(lambda: stub.PredictWeights(predict_request(model)))
    assert error.code() is Code.INVALID_ARGUMENT
    assert violated_field(error) == "architecture.onnx_model"
    assert details(error)["ErrorInfo"].domain == "ghn.v1"


def test_a_model_without_operator_sets(stub: ghn_pb2_grpc.GhnServiceStub) -> None:
    model = onnx.load_model_from_string(TINY)
    del model.opset_import[:]
    assert failure(lambda: stub.PredictWeights(predict_request(model.SerializeToString()))).code() is (
        Code.INVALID_ARGUMENT
    )


@pytest.mark.parametrize(
    "model",
    [linear_model(*[4] * 40), linear_model(*[4] * 18), linear_model(200, 200)],
    ids=["too many nodes", "too many nodes of the graph", "too many parameters"],
)
def test_a_model_over_a_limit(stub: ghn_pb2_grpc.GhnServiceStub, model: bytes) -> None:
    error = failure(lambda: stub.PredictWeights(predict_request(model)))
    assert error.code() is Code.RESOURCE_EXHAUSTED
    assert {"QuotaFailure", "ErrorInfo"} <= set(details(error))
    assert details(error)["ErrorInfo"].reason == "LIMIT_EXCEEDED"


def test_a_message_over_the_receive_limit_leaves_the_server_alive(stub: ghn_pb2_grpc.GhnServiceStub) -> None:
    error = failure(lambda: stub.PredictWeights(predict_request(bytes(1_000_000))))
    assert error.code() is Code.RESOURCE_EXHAUSTED
    assert receive_file(stub.PredictWeights(predict_request(TINY)))


def test_a_newer_operator_set(stub: ghn_pb2_grpc.GhnServiceStub) -> None:
    model = onnx.load_model_from_string(TINY)
    model.opset_import[0].version = 999
    error = failure(lambda: stub.PredictWeights(predict_request(model.SerializeToString())))
    assert error.code() is Code.UNIMPLEMENTED


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"dtype": 99}, "dtype"),
        ({"steps": [ghn_pb2.PostProcessingStep(name="magic")]}, "steps[0].name"),
        ({"steps": [ghn_pb2.PostProcessingStep(name="noise", options={"odd": "1"})]}, "steps[0].options.odd"),
        ({"steps": [ghn_pb2.PostProcessingStep(name="noise", options={"beta": "nan"})]}, "steps[0].options.beta"),
        ({"steps": [ghn_pb2.PostProcessingStep(name="noise", options={"beta": "-1"})]}, "steps[0].options.beta"),
        ({"steps": [ghn_pb2.PostProcessingStep(name="noise")] * 99}, "steps"),
        ({"low_rank": ghn_pb2.LowRankOutput()}, "low_rank.rank_rule"),
        ({"low_rank": ghn_pb2.LowRankOutput(rank=0)}, "low_rank.rank"),
        ({"low_rank": ghn_pb2.LowRankOutput(fraction=math.nan)}, "low_rank.fraction"),
        ({"low_rank": ghn_pb2.LowRankOutput(energy=1.5)}, "low_rank.energy"),
        ({"low_rank": ghn_pb2.LowRankOutput(rank=1, method=77)}, "low_rank.method"),
        ({"include": [""]}, "include[0]"),
        ({"include": ["x"] * 1000}, "include"),
        ({"include": ["*a" * 500] * 20}, "include"),
        ({"include": ["nothing.has.this.name"]}, "include"),
        ({"request_id": "x" * 129}, "request_id"),
        ({"request_id": "two\nlines"}, "request_id"),
    ],
)
def test_an_impossible_option(stub: ghn_pb2_grpc.GhnServiceStub, fields: dict[str, Any], field: str) -> None:
    error = failure(lambda: stub.PredictWeights(predict_request(TINY, **fields)))
    assert error.code() is Code.INVALID_ARGUMENT
    assert violated_field(error) == field


def test_an_unknown_hypernetwork(stub: ghn_pb2_grpc.GhnServiceStub) -> None:
    error = failure(lambda: stub.PredictWeights(predict_request(TINY, model="nobody")))
    assert error.code() is Code.NOT_FOUND
    assert "ResourceInfo" in details(error)


def test_an_unknown_method(server: RunningServer) -> None:
    with grpc.insecure_channel(server.address) as channel:
        assert code_of(lambda: channel.unary_unary("/ghn.v1.GhnService/Nothing")(b"")) is Code.UNIMPLEMENTED


@pytest.mark.parametrize("method", ["PredictWeights", "AnalyzeArchitecture"])
def test_a_request_that_is_no_message(server: RunningServer, method: str) -> None:
    with grpc.insecure_channel(server.address) as channel:
        error = failure(lambda: channel.unary_stream(f"/ghn.v1.GhnService/{method}")(b"\xff\xff\xff"))
        assert error.code() is Code.INVALID_ARGUMENT


def test_an_unknown_field_is_passed_over(server: RunningServer) -> None:
    request = predict_request(TINY).SerializeToString() + b"\xf8\x7f\x01"  # field 2047, a varint
    with grpc.insecure_channel(server.address) as channel:
        assert list(channel.unary_stream("/ghn.v1.GhnService/PredictWeights")(request))


def test_a_chosen_request_id_comes_back_with_an_error(stub: ghn_pb2_grpc.GhnServiceStub) -> None:
    error = failure(lambda: stub.PredictWeights(predict_request(b"", request_id="mine")))
    assert details(error)["ErrorInfo"].metadata["request_id"] == "mine"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (PredictionError("a value is not finite"), Code.INTERNAL),
        (MemoryError(), Code.RESOURCE_EXHAUSTED),
        (torch.OutOfMemoryError("CUDA out of memory"), Code.RESOURCE_EXHAUSTED),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
            Code.RESOURCE_EXHAUSTED,
        ),
        (OSError(12, "Cannot allocate memory"), Code.RESOURCE_EXHAUSTED),
        (RuntimeError("anything"), Code.INTERNAL),
        (KeyboardInterrupt(), Code.INTERNAL),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_a_failing_prediction_harms_only_itself(tmp_path: Path, error: BaseException, code: Code) -> None:
    predictor = FakePredictor(before_decoding=raises(error))
    with fake_server(tmp_path, predictor) as server, connect(server) as stub:
        assert failure(lambda: stub.PredictWeights(predict_request(TINY))).code() is code
        predictor.before_decoding = lambda on_stage: None
        assert receive_file(stub.PredictWeights(predict_request(TINY)))


def test_running_out_of_memory_asks_to_try_again(tmp_path: Path) -> None:
    with fake_server(tmp_path, FakePredictor(before_decoding=raises(MemoryError()))) as server, connect(server) as stub:
        error = failure(lambda: stub.PredictWeights(predict_request(TINY)))
    assert "RetryInfo" in details(error)
    assert "grpc-retry-pushback-ms" in {key for key, _ in error.trailing_metadata()}


def test_an_unforeseen_error_tells_nothing_but_the_request_id(tmp_path: Path) -> None:
    secret = "/secret/place/of/the/server"
    predictor = FakePredictor(before_decoding=raises(RuntimeError(secret)))
    with fake_server(tmp_path, predictor) as server, connect(server) as stub:
        error = failure(lambda: stub.PredictWeights(predict_request(TINY, request_id="find-me")))
    assert "find-me" in error.details()
    assert secret not in error.details() + repr(error.trailing_metadata())


def test_trailers_stay_small_whatever_the_message(tmp_path: Path) -> None:
    predictor = FakePredictor(before_decoding=raises(PredictionError("ä" * 100_000)))
    with fake_server(tmp_path, predictor) as server, connect(server) as stub:
        error = failure(lambda: stub.PredictWeights(predict_request(TINY)))
    # gRPC percent-encodes the message (3 bytes for each byte above 127) and base64-encodes the details.
    size = 3 * len(error.details().encode()) + sum(
        len(key) + 4 / 3 * len(value) for key, value in error.trailing_metadata()
    )
    assert error.code() is Code.INTERNAL
    assert size < 8192


def test_a_checkpoint_that_cannot_be_loaded(tmp_path: Path) -> None:
    def load(path: Path, device: str) -> FakePredictor:
        raise CheckpointError("damaged")

    with start_server(fake_settings(tmp_path), load=load) as server, connect(server) as stub:
        with pytest.raises(CheckpointError):
            server.wait_ready(10)
        assert failure(lambda: stub.PredictWeights(predict_request(TINY))).code() is Code.FAILED_PRECONDITION
