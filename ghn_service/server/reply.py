"""A prediction as a stream: the header event, and a safetensors file whose hash begins with its first final tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version

import torch

from ghn_client.wire import ghn_pb2
from ghn_client.wire.buffers import BackgroundSha256
from ghn_client.wire.codec import TensorEntry, encode_safetensors_header
from ghn_client.wire.metadata import PredictionMetadata, TensorNote, TensorUse, encode_metadata
from ghn_service.errors import InvalidArchitectureError
from ghn_service.graph.architecture import ArchitectureGraph, ParameterSpec
from ghn_service.parameters import ParameterSet
from ghn_service.postprocess.low_rank.output import encode_low_rank_record
from ghn_service.postprocess.steps import encode_record
from ghn_service.predictor import ArchitectureAnalysis, PredictionOptions, PredictionResult
from ghn_service.server.messages import encode_dtype, encode_tensors
from ghn_service.server.models import LoadedModel
from ghn_service.server.tensor_memory import adjacent_buffers

SAFETENSORS_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
VERSION = version("ghn-service")
HASHED_FROM_BYTES = 1 << 20
"""Bytes of final tensors that are worth a word to the thread that hashes."""


@dataclass(frozen=True, slots=True, eq=False)
class Reply:
    """What is streamed for one prediction.

    Attributes:
        header: The event that comes first.
        file_header: First bytes of the safetensors file.
        buffers: The values that follow, in as few pieces as their memory allows.
        sha256: Has been given the whole file, and may still be hashing it.
        report_json: The diversity report, if it was asked for, else "".
    """

    header: ghn_pb2.StreamHeader
    file_header: bytes
    buffers: tuple[memoryview, ...]
    sha256: BackgroundSha256
    report_json: str = ""


class ReplyBuilder:
    """Makes the reply to one request, and hashes the tensors that are final while the others are still written.

    Hashing takes longer than sending, and nothing is sent before everything is predicted: so it begins with the first
    tensor, beside the thread that predicts. A context manager: leaving it ends the hashing.

    Args:
        graph: The architecture as it was read.
        options: Options of the request.
        model: What predicts.
    """

    def __init__(self, graph: ArchitectureGraph, options: PredictionOptions, model: LoadedModel) -> None:
        self._graph = graph
        self._options = options
        self._model = model
        self._file: _PredictedFile | None = None

    def __enter__(self) -> ReplyBuilder:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._file is not None:
            self._file.sha256.close()

    def take_written(self, parameters: ParameterSet, count: int) -> None:
        """The first ``count`` tensors are final; an ``OnWritten``.

        Raises:
            InvalidArchitectureError: The names of the architecture do not fit a safetensors file.
        """
        if self._file is None:
            self._file = self._begin(parameters, None)
        self._file.extend(count)

    def finish(self, result: PredictionResult, *, request_id: str) -> Reply:
        """The reply, once the prediction has ended.

        Raises:
            InvalidArchitectureError: The names of the architecture do not fit a safetensors file.
        """
        parameters = result.parameters
        file = self._file = self._file or self._begin(parameters, result)
        file.extend(len(parameters))
        header = ghn_pb2.StreamHeader(
            request_id=request_id,
            model=self._model.name,
            model_digest=self._model.summary.digest,
            graph_digest=file.metadata.graph_digest,
            seed=self._options.seed,
            total_bytes=file.num_bytes,
            tensors=encode_tensors(parameters.specs, parameters.origins, _op_types(self._graph)),
            warnings=parameters.warnings,
            dtype=encode_dtype(self._options.dtype),
        )
        report_json = encode_report(result, self._options, self._model)
        return Reply(header, file.header, tuple(file.buffers), file.sha256, report_json)

    def _begin(self, parameters: ParameterSet, result: PredictionResult | None) -> _PredictedFile:
        metadata = _describe(
            self._graph,
            parameters.specs,
            parameters.origins,
            self._options,
            self._model,
            warnings=parameters.warnings,
            result=result,
        )
        return _PredictedFile(metadata, _file_header(parameters.specs, self._options.dtype, metadata), parameters)


class _PredictedFile:
    """A safetensors file whose tensors become final one after the other.

    Args:
        metadata: What the file says about itself.
        header: Its first bytes.
        parameters: Its tensors.
    """

    def __init__(self, metadata: PredictionMetadata, header: bytes, parameters: ParameterSet) -> None:
        self.metadata = metadata
        self.header = header
        self.num_bytes = len(header) + parameters.num_bytes
        self.buffers: list[memoryview] = []
        self.sha256 = BackgroundSha256()
        self.sha256.update(header)
        self._tensors = tuple(parameters.values())
        self._num_seen = self._num_taken = 0
        self._waiting_bytes = 0

    def extend(self, count: int) -> None:
        """The first ``count`` tensors are final."""
        self._waiting_bytes += sum(tensor.nbytes for tensor in self._tensors[self._num_seen : count])
        self._num_seen = count
        if self._waiting_bytes >= HASHED_FROM_BYTES or count == len(self._tensors):
            for buffer in adjacent_buffers(self._tensors[self._num_taken : count]):
                self.buffers.append(buffer)
                self.sha256.update(buffer)
            self._num_taken, self._waiting_bytes = count, 0


def encode_report(result: PredictionResult, options: PredictionOptions, model: LoadedModel) -> str:
    """The diversity report as JSON, with the prediction that it is about; "" if there is none."""
    if result.report is None:
        return ""
    prediction = {
        "model": model.name,
        "model_digest": model.summary.digest,
        "graph_digest": result.graph.digest(),
        "seed": options.seed,
        "dtype": options.dtype,
    }
    low_rank = encode_low_rank_record(result.low_rank) if result.low_rank else None
    return json.dumps({"prediction": prediction, **result.report, "low_rank": low_rank}, separators=(",", ":"))


def expected_bytes(analysis: ArchitectureAnalysis, dtype: str, model: LoadedModel) -> int:
    """Bytes of the reply to a request without further options."""
    options = PredictionOptions(dtype=dtype)
    metadata = _describe(
        analysis.graph, analysis.specs, analysis.origins, options, model, warnings=analysis.warnings, result=None
    )
    values = sum(entry.num_bytes for entry in _entries(analysis.specs, dtype))
    return len(_file_header(analysis.specs, dtype, metadata)) + values


def _file_header(specs: Mapping[str, ParameterSpec], dtype: str, metadata: PredictionMetadata) -> bytes:
    try:
        return encode_safetensors_header(_entries(specs, dtype), encode_metadata(metadata))
    except ValueError as error:
        raise InvalidArchitectureError(
            f"the tensor names do not fit a safetensors file: {error}", field="architecture.onnx_model"
        ) from error


def _entries(specs: Mapping[str, ParameterSpec], dtype: str) -> list[TensorEntry]:
    return [TensorEntry(name, SAFETENSORS_DTYPES[dtype], spec.shape) for name, spec in specs.items()]


def _describe(
    graph: ArchitectureGraph,
    specs: Mapping[str, ParameterSpec],
    origins: Mapping[str, str],
    options: PredictionOptions,
    model: LoadedModel,
    *,
    warnings: tuple[str, ...],
    result: PredictionResult | None,
) -> PredictionMetadata:
    """What the file says about itself; nothing of it differs between two equal requests."""
    low_rank = result.low_rank if result else None
    return PredictionMetadata(
        model=model.name,
        model_digest=model.summary.digest,
        graph_digest=graph.digest(),
        seed=options.seed,
        dtype=options.dtype,
        tensors=tuple(_note(name, spec, origins[name]) for name, spec in specs.items()),
        buffers=tuple(buffer.name for buffer in graph.buffers),
        warnings=warnings,
        steps=tuple(encode_record(record) for record in result.records) if result else (),
        low_rank=encode_low_rank_record(low_rank) if low_rank else None,
        include=options.include,
        versions={"ghn-service": VERSION, "torch": torch.__version__},
    )


def _note(name: str, spec: ParameterSpec, origin: str) -> TensorNote:
    return TensorNote(
        name=name,
        origin=origin,
        initializer=spec.initializer or name,
        torch_name=spec.torch_name,
        permutation=spec.permutation,
        uses=tuple(TensorUse(use.node, use.input_index) for use in spec.uses),
    )


def _op_types(graph: ArchitectureGraph) -> dict[str, str]:
    return {spec.name: node.op_type for node in graph.nodes for spec in node.parameters}
