"""A prediction as a stream: the header event, and a safetensors file as buffers that are made one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version

import torch

from ghn_client.wire import ghn_pb2
from ghn_client.wire.codec import TensorEntry, encode_safetensors_header
from ghn_client.wire.metadata import PredictionMetadata, TensorNote, TensorUse, encode_metadata
from ghn_service.errors import InvalidArchitectureError
from ghn_service.graph.architecture import ArchitectureGraph, ParameterSpec
from ghn_service.parameters import ParameterSet
from ghn_service.postprocess.low_rank_plan import encode_low_rank_record
from ghn_service.postprocess.records import encode_record
from ghn_service.predictor import ArchitectureAnalysis, PredictionOptions, PredictionResult
from ghn_service.server.messages import encode_dtype, encode_tensors
from ghn_service.server.models import LoadedModel

SAFETENSORS_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
VERSION = version("ghn-service")


@dataclass(frozen=True, slots=True, eq=False)
class Reply:
    """What is streamed for one prediction.

    Attributes:
        header: The event that comes first.
        file_header: First bytes of the safetensors file.
        parameters: The values that follow.
        report_json: The diversity report, if it was asked for, else "".
    """

    header: ghn_pb2.StreamHeader
    file_header: bytes
    parameters: ParameterSet
    report_json: str = ""

    def buffers(self) -> Iterator[memoryview]:
        """Bytes of each tensor, without a copy where it is contiguous."""
        for tensor in self.parameters.values():
            yield tensor_bytes(tensor)


def build_reply(result: PredictionResult, options: PredictionOptions, model: LoadedModel, *, request_id: str) -> Reply:
    """Puts everything together that is known before the first byte is sent.

    Raises:
        InvalidArchitectureError: The names of the architecture do not fit a safetensors file.
    """
    parameters, graph = result.parameters, result.graph
    metadata = _describe(
        graph, parameters.specs, parameters.origins, options, model, warnings=parameters.warnings, result=result
    )
    file_header = _file_header(parameters.specs, options.dtype, metadata)
    header = ghn_pb2.StreamHeader(
        request_id=request_id,
        model=model.name,
        model_digest=model.summary.digest,
        graph_digest=metadata.graph_digest,
        seed=options.seed,
        total_bytes=len(file_header) + parameters.num_bytes,
        tensors=encode_tensors(parameters.specs, parameters.origins, _op_types(graph)),
        warnings=parameters.warnings,
        dtype=encode_dtype(options.dtype),
    )
    return Reply(header, file_header, parameters, encode_report(result, options, model))


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


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The values of a CPU tensor as bytes; a view where it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


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
