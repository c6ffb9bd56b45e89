"""Messages of the protocol <-> our values, in pairs; everything that a request may say is checked here."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch

from ghn_client.wire import ghn_pb2
from ghn_client.wire.codec import decode_enum, encode_enum
from ghn_service.errors import InvalidOptionError
from ghn_service.postprocess.low_rank.factorize import FUNCTION, SCALED
from ghn_service.postprocess.low_rank.output import FactorRecord, RankCost
from ghn_service.postprocess.low_rank.ranks import FUNCTION_ERROR, RANK_RULES, LowRank
from ghn_service.postprocess.steps import POSTPROCESSORS, Step
from ghn_service.predictor import (
    DECODING,
    ENCODING,
    POST_PROCESSING,
    READING,
    TRANSFERRING,
    ArchitectureAnalysis,
    PlannedTransfer,
    PredictionOptions,
)
from ghn_service.server.models import LoadedModel
from ghn_service.server.queue import JobProgress
from ghn_service.server.settings import Settings
from ghn_service.transfer.library import SourceSummary
from ghn_service.transfer.source import Source
from ghn_service.transfer.transfer import Head
from ghn_service.trust import Trust

MAX_INCLUDE_PATTERNS = 256
MAX_PATTERN_CHARACTERS = 1024
MAX_INCLUDE_CHARACTERS = 8192
"""Of all patterns together: a thousand stars take 30 ms to compile."""
MAX_OPTION_CHARACTERS = 256
MAX_SOURCE_CHARACTERS = 256
STAGES: Mapping[str, ghn_pb2.Stage.ValueType] = {
    "": ghn_pb2.STAGE_QUEUED,
    READING: ghn_pb2.STAGE_ENCODING,
    ENCODING: ghn_pb2.STAGE_ENCODING,
    TRANSFERRING: ghn_pb2.STAGE_TRANSFERRING,
    DECODING: ghn_pb2.STAGE_PREDICTING,
    POST_PROCESSING: ghn_pb2.STAGE_POST_PROCESSING,
}


def decode_options(request: ghn_pb2.PredictWeightsRequest) -> PredictionOptions:
    """The options of a request.

    Raises:
        InvalidOptionError: One has an impossible value; ``field`` names it.
    """
    return PredictionOptions(
        dtype=decode_dtype(request.dtype),
        seed=request.seed,
        steps=tuple(_decode_step(step, index) for index, step in enumerate(request.steps)),
        low_rank=decode_low_rank(request.low_rank) if request.HasField("low_rank") else None,
        include=_decode_include(request.include),
        report=request.report,
        head=decode_head(request.head),
    )


def decode_head(head: int) -> str:
    """What becomes of a classifier.

    Raises:
        InvalidOptionError: There is no such choice.
    """
    return _decode_choice(ghn_pb2.Head, head, field="head") or "auto"


def encode_trust(trust: Trust | None) -> ghn_pb2.Trust | None:
    """How much to expect of weights; what differs most from the training graphs is told in its reasons alone."""
    if trust is None:
        return None
    fields = dataclasses.asdict(trust)
    return ghn_pb2.Trust(**{name: fields[name] for name in ghn_pb2.Trust.DESCRIPTOR.fields_by_name})


def decode_low_rank(low_rank: ghn_pb2.LowRankOutput, *, with_curves: bool = False) -> LowRank:
    """What a request asks of low rank.

    Raises:
        InvalidOptionError: No rule is given, or a value is impossible.
    """
    method = _decode_choice(ghn_pb2.LowRankMethod, low_rank.method, field="low_rank.method")
    rule = low_rank.WhichOneof("rank_rule")
    if rule is None:
        raise InvalidOptionError(f"expected one of {', '.join(RANK_RULES)}, got none", field="low_rank.rank_rule")
    best = FUNCTION if rule == FUNCTION_ERROR else SCALED
    return LowRank(rule, float(getattr(low_rank, rule)), method or best, with_curves, low_rank.force)


def decode_dtype(dtype: int) -> str:
    """Name of an element type.

    Raises:
        InvalidOptionError: There is none of this number.
    """
    return _decode_choice(ghn_pb2.DataType, dtype, field="dtype") or "float32"


def decode_source(source: ghn_pb2.SourceOptions) -> tuple[str, Head, bool]:
    """Name of a source, what becomes of the class layer, and whether post-processing changes what the source gives.

    Raises:
        InvalidOptionError: There is no name, or a value is impossible.
    """
    if not 1 <= len(source.name) <= MAX_SOURCE_CHARACTERS:
        raise InvalidOptionError(
            f"expected the name of a source, 1 to {MAX_SOURCE_CHARACTERS} characters, got {len(source.name)}",
            field="source.name",
        )
    head = _decode_choice(ghn_pb2.ClassLayer, source.class_layer, field="source.class_layer") or "auto"
    return source.name, cast("Head", head), source.post_process


def _decode_choice(kind: Any, number: int, *, field: str) -> str:
    """Name of a value of an enum; "" where the choice is the server's."""
    if number not in kind.values():
        raise InvalidOptionError(f"expected one of {', '.join(kind.keys())}, got the number {number}", field=field)
    return decode_enum(kind, number)


def encode_progress(progress: JobProgress) -> ghn_pb2.PredictWeightsResponse:
    """A sign of life."""
    stage = STAGES[progress.stage]
    return ghn_pb2.PredictWeightsResponse(
        progress=ghn_pb2.Progress(stage=stage, queue_position=progress.queue_position)
    )


def encode_analysis(
    analysis: ArchitectureAnalysis, model: LoadedModel, *, total_bytes: int, request_id: str
) -> ghn_pb2.AnalyzeArchitectureResponse:
    """The answer of AnalyzeArchitecture."""
    graph = analysis.graph
    return ghn_pb2.AnalyzeArchitectureResponse(
        request_id=request_id,
        num_nodes=graph.num_nodes,
        num_edges=len(graph.edges),
        num_parameters=graph.num_parameters,
        num_predicted_parameters=analysis.num_predicted_parameters,
        total_bytes=total_bytes,
        tensors=[
            ghn_pb2.TensorInfo(
                name=name,
                shape=spec.shape,
                origin=analysis.origins[name],
                initializer=spec.initializer or name,
                torch_name=spec.torch_name,
                op_type=analysis.op_types[name],
                uses=[ghn_pb2.TensorUse(node=use.node, input_index=use.input_index) for use in spec.uses],
                permutation=spec.permutation,
            )
            for name, spec in analysis.specs.items()
        ],
        buffers=[buffer.name for buffer in graph.buffers if buffer.name not in analysis.statistics],
        warnings=analysis.warnings,
        op_type_counts=Counter(node.op_type for node in graph.nodes),
        unknown_operators=graph.unknown_operators,
        graph_digest=graph.digest(),
        model=model.name,
        low_rank_layers=[_encode_factor_record(layer) for layer in analysis.low_rank.layers]
        if analysis.low_rank
        else (),
        transfer=encode_transfer(analysis.transfer, analysis.statistics) if analysis.transfer else None,
        trust=encode_trust(analysis.trust),
    )


def encode_transfer(
    transfer: PlannedTransfer, statistics: Iterable[str], options: PredictionOptions | None = None
) -> ghn_pb2.TransferSummary:
    """What a source gives; ``statistics`` are the names of those that come along."""
    plan = transfer.plan
    is_changed = options is not None and (options.low_rank is not None or bool(options.steps and transfer.post_process))
    return ghn_pb2.TransferSummary(
        source=_encode_source(transfer.source),
        is_exact=plan.is_exact and not is_changed,
        cut_groups=plan.cut_groups,
        left_out=plan.left_out,
        similarity=plan.similarity,
        statistics=statistics,
        is_changed=is_changed,
        contains_source=plan.contains_source and not is_changed,
    )


def _encode_source(source: Source | SourceSummary) -> ghn_pb2.SourceInfo:
    """What people should know of a source."""
    card = source.card
    return ghn_pb2.SourceInfo(
        name=source.name,
        digest=source.digest,
        num_parameters=source.num_parameters,
        dataset=card.dataset,
        class_names=card.class_names,
        accuracy=card.accuracy,
        licence=card.licence,
        card_json=json.dumps(dataclasses.asdict(card), separators=(",", ":"), ensure_ascii=False),
    )


def _encode_factor_record(layer: FactorRecord) -> ghn_pb2.LowRankLayer:
    def encode_cost(cost: RankCost) -> ghn_pb2.RankCost:
        return ghn_pb2.RankCost(**dataclasses.asdict(cost))

    return ghn_pb2.LowRankLayer(
        parameter=layer.parameter,
        method=encode_enum(ghn_pb2.LowRankMethod, layer.method),
        activation=layer.activation,
        normalized=layer.normalized,
        note=layer.note,
        dense=encode_cost(layer.dense),
        chosen=encode_cost(layer.chosen),
        curve=[encode_cost(cost) for cost in layer.curve],
    )


def encode_models(
    models: Iterable[LoadedModel], sources: Iterable[SourceSummary], *, default_name: str
) -> ghn_pb2.ListModelsResponse:
    """The answer of ListModels."""
    entries = [
        ghn_pb2.ModelInfo(
            name=model.name,
            digest=model.summary.digest,
            kind=model.summary.kind,
            num_parameters=model.summary.num_parameters,
            num_classes=model.summary.config.num_classes,
            dataset=model.summary.card.dataset,
            is_default=model.name == default_name,
            device=model.devices[0],
        )
        for model in models
    ]
    return ghn_pb2.ListModelsResponse(models=entries, steps=list(POSTPROCESSORS), sources=map(_encode_source, sources))


def encode_server_info(
    settings: Settings, devices: Iterable[str], *, version: str, uptime_s: float
) -> ghn_pb2.GetServerInfoResponse:
    """The answer of GetServerInfo."""
    limits = ghn_pb2.Limits(**{name: getattr(settings, name) for name in ghn_pb2.Limits.DESCRIPTOR.fields_by_name})
    return ghn_pb2.GetServerInfoResponse(
        version=version, torch_version=torch.__version__, devices=devices, limits=limits, uptime_seconds=uptime_s
    )


def _decode_step(step: ghn_pb2.PostProcessingStep, index: int) -> Step:
    for name, text in step.options.items():
        if max(len(name), len(text)) > MAX_OPTION_CHARACTERS:
            raise InvalidOptionError(
                f"expected at most {MAX_OPTION_CHARACTERS} characters per option", field=f"steps[{index}].options"
            )
    return Step(step.name, dict(sorted(step.options.items())))


def _decode_include(patterns: Iterable[str]) -> tuple[str, ...]:
    include = tuple(patterns)
    if len(include) > MAX_INCLUDE_PATTERNS:
        raise InvalidOptionError(
            f"expected at most {MAX_INCLUDE_PATTERNS} patterns, got {len(include)}", field="include"
        )
    for index, pattern in enumerate(include):
        if not 1 <= len(pattern) <= MAX_PATTERN_CHARACTERS:
            raise InvalidOptionError(
                f"expected 1 to {MAX_PATTERN_CHARACTERS} characters, got {len(pattern)}", field=f"include[{index}]"
            )
    if sum(map(len, include)) > MAX_INCLUDE_CHARACTERS:
        raise InvalidOptionError(
            f"expected at most {MAX_INCLUDE_CHARACTERS} characters in all patterns, got {sum(map(len, include))}",
            field="include",
        )
    return include
