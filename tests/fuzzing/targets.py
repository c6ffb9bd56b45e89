"""What must hold for any bytes of a stranger: a typed error or a whole result, at a price that fits the size."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from pathlib import Path

import grpc
from google.protobuf.message import DecodeError

from ghn_client.errors import FileError, LimitExceededError, StreamCorruptedError
from ghn_client.wire import ghn_pb2
from ghn_client.wire.codec import decode_safetensors_header, receive_stream
from ghn_client.wire.metadata import decode_metadata
from ghn_service.errors import GhnServiceError, InvalidOptionError
from ghn_service.graph.architecture import ArchitectureGraph, decode_graph, encode_graph
from ghn_service.graph.onnx.reader import read_onnx
from ghn_service.graph.raw_graph import GraphLimits
from ghn_service.predictor import PredictionOptions, Predictor
from ghn_service.server.calls import status_row
from ghn_service.server.messages import decode_options, encode_analysis
from ghn_service.server.models import LoadedModel
from ghn_service.server.reply import encode_result_header, encode_values, expected_bytes
from tests.hypernetwork.small_graphs import small_ghn
from tests.server.fake_predictor import SUMMARY

LIMITS = GraphLimits(max_bytes=1 << 20, max_nodes=2000, max_graph_nodes=200, max_tensors=500, max_parameters=100_000)
CORPUS = Path(__file__).parents[1] / "data" / "corpus"
SECONDS_ALLOWED = 0.5
SECONDS_PER_BYTE_ALLOWED = 1e-4
_OPTIONS = PredictionOptions()
MODEL = LoadedModel("fuzzed", SUMMARY, (), ("cpu",))


class CostlyInputError(Exception):
    """An input took more time than its size allows."""


@functools.cache
def predictor() -> Predictor:
    return Predictor(small_ghn())


def read_or_refuse(data: bytes, *, limits: GraphLimits = LIMITS) -> ArchitectureGraph | None:
    """The graph of a model, which survives being stored, or None for a refusal that a client can understand."""
    try:
        graph = read_onnx(data, limits=limits)
    except GhnServiceError as error:
        if error.field != "architecture.onnx_model" or status_row(error).code is grpc.StatusCode.INTERNAL:
            raise
        str(error).encode()  # it travels as UTF-8
        return None
    assert decode_graph(encode_graph(graph)) == graph
    return graph


def reader(data: bytes) -> bool:
    """All that a server does with an architecture; whether it was accepted."""
    graph = read_or_refuse(data)
    if graph is None:
        return False
    analysis = predictor().analyze(graph)
    answer = encode_analysis(analysis, MODEL, total_bytes=expected_bytes(analysis, "float32", MODEL), request_id="r")
    answer.SerializeToString()
    result = predictor().run(graph)
    file = encode_result_header(result, _OPTIONS, MODEL) + b"".join(encode_values(result.parameters))
    assert len(file) == answer.total_bytes
    tensors, metadata = decode_safetensors_header(file)
    assert {name: item.shape for name, item in tensors.items()} == {
        spec.name: spec.shape for spec in graph.parameters()
    }
    assert all(math.prod(item.shape) * 4 == item.stop - item.start for item in tensors.values())
    decode_metadata(metadata)
    return True


def request(data: bytes) -> bool:
    """The options of a request; whether they are possible."""
    try:
        decode_options(ghn_pb2.PredictWeightsRequest.FromString(data))
    except (DecodeError, InvalidOptionError):
        return False
    return True


def codec(data: bytes) -> bool:
    """A stream as a client receives it, its messages after their lengths in two bytes; whether it was whole."""
    messages = []
    while data:
        size = int.from_bytes(data[:2], "big")
        messages.append(data[2 : 2 + size])
        data = data[2 + size :]
    try:
        buffer, _ = receive_stream(messages, max_bytes=1 << 20)
        _, metadata = decode_safetensors_header(buffer)
        decode_metadata(metadata)
    except (StreamCorruptedError, LimitExceededError, FileError):
        return False
    return True


def file(data: bytes) -> bool:
    """A safetensors file as a client opens it; whether it is a prediction."""
    try:
        decode_metadata(decode_safetensors_header(data)[1])
    except (StreamCorruptedError, FileError):
        return False
    return True


TARGETS: dict[str, Callable[[bytes], bool]] = {"reader": reader, "request": request, "codec": codec, "file": file}


def check_cost(target: Callable[[bytes], bool], data: bytes) -> None:
    """Runs a target.

    Raises:
        CostlyInputError: It took longer than inputs of this size may.
    """
    start = time.process_time()
    target(data)
    seconds = time.process_time() - start
    if seconds > SECONDS_ALLOWED + SECONDS_PER_BYTE_ALLOWED * len(data):
        raise CostlyInputError(f"{len(data)} bytes took {seconds:.2f} seconds")
