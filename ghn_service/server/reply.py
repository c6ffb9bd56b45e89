"""A prediction as a safetensors file: what it says about itself, its values without a copy, and its memory."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from google.protobuf.json_format import MessageToDict

from ghn_client.wire.codec import DTYPE_BYTES, encode_safetensors_header
from ghn_client.wire.metadata import PredictionMetadata, TensorInfo, TensorUse, encode_metadata
from ghn_service.errors import InvalidArchitectureError
from ghn_service.graph.architecture import ArchitectureGraph
from ghn_service.hypernetwork.fill import MAX_ELEMENTS_HELD
from ghn_service.parameters import ParameterSet
from ghn_service.postprocess.low_rank.output import encode_low_rank_record
from ghn_service.postprocess.weighted_layers import StepRecord
from ghn_service.predictor import ArchitectureAnalysis, PlannedTransfer, PredictionOptions, PredictionResult
from ghn_service.server.messages import encode_transfer
from ghn_service.server.models import LoadedModel
from ghn_service.trust import Trust

STATISTICS_DTYPE = "F32"
SAFETENSORS_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
VERSION = version("ghn-service")
NODE_BYTES = 8192
"""Memory of a node or tensor beside its values: records, names, a row of embeddings."""


def encode_result_header(result: PredictionResult, options: PredictionOptions, model: LoadedModel) -> bytes:
    """The first bytes of the file of a prediction; nothing of them differs between two equal requests.

    Raises:
        InvalidArchitectureError: The names of the architecture do not fit a safetensors file.
    """
    parameters = result.parameters
    known = ArchitectureAnalysis(
        result.graph,
        parameters.specs,
        parameters.origins,
        warnings=parameters.warnings,
        low_rank=result.low_rank,
        transfer=result.transfer,
        trust=result.trust,
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in result.statistics.items()}
    return _encode_header(known, options, model, statistics=shapes, records=result.records)


def expected_bytes(analysis: ArchitectureAnalysis, dtype: str, model: LoadedModel) -> int:
    """Bytes of the reply to a request without further options."""
    known = dataclasses.replace(analysis, low_rank=None)
    header = _encode_header(known, PredictionOptions(dtype=dtype), model, statistics=analysis.statistics)
    num_elements = sum(spec.num_elements for spec in analysis.specs.values())
    num_statistics = sum(map(math.prod, analysis.statistics.values()))
    num_bytes = num_elements * DTYPE_BYTES[SAFETENSORS_DTYPES[dtype]]
    return len(header) + num_bytes + num_statistics * DTYPE_BYTES[STATISTICS_DTYPE]


@dataclass(frozen=True, eq=False)
class Reply:
    """What is sent for a prediction; equal requests share one.

    Attributes:
        header: The first bytes of the file.
        result: The prediction, whose values follow.
        report_json: The diversity report; "" if none was asked for.
    """

    header: bytes
    result: PredictionResult
    report_json: str

    @property
    def num_bytes(self) -> int:
        """Bytes of the file."""
        return len(self.header) + self.result.num_bytes

    @property
    def memory_bytes(self) -> int:
        """Memory that it holds, which is more than its file where tensors are parts of larger ones."""
        values = [*self.result.parameters.values(), *self.result.statistics.values()]
        storages = {item.untyped_storage().data_ptr(): item.untyped_storage().nbytes() for item in values}
        texts = len(self.header) + len(self.report_json)
        return texts + sum(storages.values()) + NODE_BYTES * self.result.graph.num_nodes


def encode_reply(result: PredictionResult, options: PredictionOptions, model: LoadedModel) -> Reply:
    """The reply with a prediction, without the source that it came from; raises as ``encode_result_header`` does."""
    report_json = _encode_report(result, options, model) if result.report is not None else ""
    return Reply(encode_result_header(result, options, model), dataclasses.replace(result, transfer=None), report_json)


def prediction_memory(
    graph: ArchitectureGraph, options: PredictionOptions, model: LoadedModel, transfer: PlannedTransfer | None = None
) -> int:
    """Bytes of memory that a prediction takes at most while it is made, its reply included; an estimate from above.

    Steps and factors work on all tensors in float32, beside what comes of them (docs/server.md, *Memory*).
    """
    sizes = {spec.name: spec.num_elements for spec in graph.parameters()}
    all_bytes = 4 * sum(sizes.values())
    wanted = sum(size for name, size in sizes.items() if options.includes(name))
    reply_bytes = wanted * DTYPE_BYTES[SAFETENSORS_DTYPES[options.dtype]]
    config = model.summary.config
    pair_bytes = 8 * config.num_heads + 12 if config.encoder == "graphormer" else 16
    decoded_bytes = 2 * 4 * max(MAX_ELEMENTS_HELD, *(min(size, math.prod(config.max_shape)) for size in sizes.values()))
    given = transfer.source.tensors.values() if transfer is not None else ()
    source_bytes = all_bytes + sum(tensor.nbytes for tensor in given) if given else 0
    return (
        reply_bytes
        + source_bytes
        + 3 * all_bytes * options.has_steps
        + min(decoded_bytes, 2 * all_bytes)
        + pair_bytes * graph.num_nodes**2
        + NODE_BYTES * (graph.num_nodes + len(sizes))
    )


def encode_values(
    parameters: ParameterSet, statistics: Mapping[str, torch.Tensor] | None = None
) -> Iterator[memoryview]:
    """The bytes of each tensor, in the header's order; views of its memory, unless it is not contiguous."""
    for tensor in (*(statistics or {}).values(), *parameters.values()):
        yield tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def _encode_report(result: PredictionResult, options: PredictionOptions, model: LoadedModel) -> str:
    """The diversity report as JSON, with the prediction that it is about."""
    prediction = {
        "model": model.name,
        "model_digest": model.summary.digest,
        "graph_digest": result.graph.digest(),
        "seed": options.seed,
        "dtype": options.dtype,
    }
    low_rank = encode_low_rank_record(result.low_rank) if result.low_rank else None
    return json.dumps({"prediction": prediction, **(result.report or {}), "low_rank": low_rank}, separators=(",", ":"))


def _encode_header(
    known: ArchitectureAnalysis,
    options: PredictionOptions,
    model: LoadedModel,
    *,
    statistics: Mapping[str, tuple[int, ...]],
    records: Sequence[StepRecord] = (),
) -> bytes:
    """Length and JSON of a file's header; running statistics, which are always float32, come before the weights."""
    metadata = PredictionMetadata(
        model=model.name,
        model_digest=model.summary.digest,
        graph_digest=known.graph.digest(),
        seed=options.seed,
        dtype=options.dtype,
        tensors=tuple(
            TensorInfo(
                name=name,
                origin=known.origins[name],
                initializer=spec.initializer or name,
                torch_name=spec.torch_name,
                permutation=spec.permutation,
                uses=tuple(TensorUse(use.node, use.input_index) for use in spec.uses),
            )
            for name, spec in known.specs.items()
        ),
        buffers=tuple(buffer.name for buffer in known.graph.buffers if buffer.name not in statistics),
        warnings=known.warnings,
        steps=tuple(dataclasses.asdict(record) for record in records),
        low_rank=encode_low_rank_record(known.low_rank) if known.low_rank else None,
        include=options.include,
        versions={"ghn-service": VERSION, "torch": torch.__version__},
        transfer=_transfer_document(known.transfer, statistics, options) if known.transfer else None,
        trust=_trust_document(known.trust) if known.trust else None,
    )
    tensors = {name: (STATISTICS_DTYPE, shape) for name, shape in statistics.items()}
    tensors |= {name: (SAFETENSORS_DTYPES[options.dtype], spec.shape) for name, spec in known.specs.items()}
    try:
        return encode_safetensors_header(tensors, encode_metadata(metadata))
    except ValueError as error:
        raise InvalidArchitectureError(
            f"the tensor names do not fit a safetensors file: {error}", field="architecture.onnx_model"
        ) from error


def _trust_document(trust: Trust) -> dict[str, Any]:
    """The verdict as the metadata has it."""
    document = dataclasses.asdict(trust)
    del document["deviations"]  # a report has them
    return document


def _transfer_document(
    transfer: PlannedTransfer, statistics: Iterable[str], options: PredictionOptions
) -> dict[str, Any]:
    """``TransferSummary`` in protobuf's JSON mapping, as the metadata has it."""
    document: dict[str, Any] = MessageToDict(
        encode_transfer(transfer, statistics, options),
        preserving_proto_field_name=True,
        always_print_fields_with_no_presence=True,
    )
    return document
