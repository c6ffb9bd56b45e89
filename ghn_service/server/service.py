"""The servicer: one method per rpc, each a few lines from message to message."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import grpc

from ghn_client.wire import ghn_pb2, ghn_pb2_grpc
from ghn_client.wire.codec import encode_chunks
from ghn_service.errors import DeadlineExceededError, InvalidOptionError
from ghn_service.graph.architecture import ArchitectureGraph
from ghn_service.graph.onnx.reader import read_onnx
from ghn_service.predictor import READING, PlannedTransfer, PredictionOptions, PredictionResult, plan_source
from ghn_service.server.messages import (
    decode_dtype,
    decode_low_rank,
    decode_options,
    decode_source,
    encode_analysis,
    encode_models,
    encode_progress,
    encode_server_info,
)
from ghn_service.server.models import LoadedModel, ModelRegistry
from ghn_service.server.queue import Job, StageCallback, WorkQueue
from ghn_service.server.reply import VERSION, encode_report, encode_result_header, encode_values, expected_bytes
from ghn_service.server.settings import Settings
from ghn_service.server.watchdog import Watchdog
from ghn_service.transfer.library import Library

Events = Iterator[ghn_pb2.PredictWeightsResponse | bytes]


class GhnService(ghn_pb2_grpc.GhnServiceServicer):
    """Answers the calls of ``ghn.v1.GhnService``; ``CallInterceptor`` names requests and maps errors.

    Args:
        settings: Limits.
        models: The hypernetworks.
        sources: Trained networks that weights are taken from.
        work_queue: Where predictions wait.
        watchdog: Ends streams that stand still.
    """

    def __init__(
        self,
        settings: Settings,
        models: ModelRegistry,
        sources: Library,
        work_queue: WorkQueue,
        watchdog: Watchdog,
    ) -> None:
        self.settings = settings
        self.limits = settings.limits
        self.models = models
        self.sources = sources
        self.work_queue = work_queue
        self.watchdog = watchdog
        self.started = time.monotonic()

    def PredictWeights(  # type: ignore[override]  # noqa: N802
        self, request: ghn_pb2.PredictWeightsRequest, context: grpc.ServicerContext
    ) -> Events:
        """Predicts every trainable tensor of an architecture; chunks are serialised already."""
        options = decode_options(request)
        model = self.models.get(request.model)
        with self._admit(context) as job:
            start = time.perf_counter()
            graph = read_onnx(request.architecture.onnx_model, limits=self.limits)
            reading_s = time.perf_counter() - start
            if options.include and not any(options.includes(spec.name) for spec in graph.parameters()):
                raise InvalidOptionError(
                    f"none of the {len(list(graph.parameters()))} tensors matches {', '.join(options.include)}",
                    field="include",
                )
            transfer, graph = self._plan_transfer(request, graph)
            for progress in job.follow(partial(_predict, model, graph, options, transfer)):
                yield encode_progress(progress)
            result = job.result()
            header = encode_result_header(result, options, model)
            total_bytes = len(header) + result.num_bytes
            yield ghn_pb2.PredictWeightsResponse(
                header=ghn_pb2.StreamHeader(request_id=request.request_id, total_bytes=total_bytes)
            )
            start = time.perf_counter()
            values = encode_values(result.parameters, result.statistics)
            with self.watchdog.watch(context.cancel, deadline=job.deadline) as watch:
                for chunk in encode_chunks(itertools.chain([header], values)):
                    if time.monotonic() > job.deadline:
                        raise DeadlineExceededError("the request ran out of time while its weights were sent")
                    yield chunk
                    watch.touch()
                streaming_s = time.perf_counter() - start
                seconds = {READING: reading_s, "waiting": job.wait_s, **result.seconds, "streaming": streaming_s}
                report_json = encode_report(result, options, model) if result.report is not None else ""
                yield ghn_pb2.PredictWeightsResponse(
                    trailer=ghn_pb2.StreamTrailer(seconds=seconds, report_json=report_json)
                )

    def AnalyzeArchitecture(  # noqa: N802
        self, request: ghn_pb2.AnalyzeArchitectureRequest, context: grpc.ServicerContext
    ) -> ghn_pb2.AnalyzeArchitectureResponse:
        """Reads an architecture and says what a prediction would do; predicts only where ranks are asked for."""
        dtype = decode_dtype(request.dtype)
        low_rank = decode_low_rank(request.low_rank, with_curves=True) if request.HasField("low_rank") else None
        model = self.models.get(request.model)
        graph = read_onnx(request.architecture.onnx_model, limits=self.limits)
        transfer, graph = self._plan_transfer(request, graph)
        analysis = model.predictors[0].analyze(graph, transfer=transfer)
        if low_rank is not None:
            with self._admit(context) as job:
                for _ in job.follow(partial(_predict, model, graph, PredictionOptions(low_rank=low_rank), transfer)):
                    pass
                analysis = replace(analysis, low_rank=job.result().low_rank)
        total_bytes = expected_bytes(analysis, dtype, model)
        return encode_analysis(analysis, model, total_bytes=total_bytes, request_id=request.request_id)

    def ListModels(  # noqa: N802
        self, request: ghn_pb2.ListModelsRequest, context: grpc.ServicerContext
    ) -> ghn_pb2.ListModelsResponse:
        """Lists the hypernetworks that are loaded, and the library of sources."""
        return encode_models(self.models.loaded(), self.sources.summaries(), default_name=self.models.default_name)

    def GetServerInfo(  # noqa: N802
        self, request: ghn_pb2.GetServerInfoRequest, context: grpc.ServicerContext
    ) -> ghn_pb2.GetServerInfoResponse:
        """Tells version, devices and limits."""
        uptime_s = time.monotonic() - self.started
        return encode_server_info(self.settings, self.models.devices, version=VERSION, uptime_s=uptime_s)

    def _plan_transfer(
        self, request: ghn_pb2.PredictWeightsRequest | ghn_pb2.AnalyzeArchitectureRequest, graph: ArchitectureGraph
    ) -> tuple[PlannedTransfer | None, ArchitectureGraph]:
        """What the source of a request gives, if it names one, and the graph with what the user should know of it."""
        if not request.HasField("source"):
            return None, graph
        name, head, post_process = decode_source(request.source)
        structure = request.architecture.onnx_model
        transfer, reasons = plan_source(
            self.sources, name, structure, head=head, post_process=post_process, limits=self.limits
        )
        return transfer, replace(graph, warnings=(*graph.warnings, *reasons))

    def _admit(self, context: grpc.ServicerContext) -> Job[PredictionResult]:
        """A place in the queue, until the client or the server gives up."""
        remaining_s = context.time_remaining()
        limit_s = self.settings.max_seconds
        deadline = time.monotonic() + (limit_s if remaining_s is None else min(limit_s, remaining_s))
        job: Job[PredictionResult] = self.work_queue.admit(deadline=deadline)
        if not context.add_callback(job.cancel):
            job.cancel()  # the client has gone already
        return job


def _predict(
    model: LoadedModel,
    graph: ArchitectureGraph,
    options: PredictionOptions,
    transfer: PlannedTransfer | None,
    device_index: int,
    on_stage: StageCallback,
) -> PredictionResult:
    """The work of one job, on a worker's thread."""
    return model.predictors[device_index].run(graph, options=options, on_stage=on_stage, transfer=transfer)
