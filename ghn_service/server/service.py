"""The servicer: one method per rpc, each a few lines from message to message."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import grpc

from ghn_client.wire import ghn_pb2, ghn_pb2_grpc
from ghn_client.wire.codec import encode_chunks
from ghn_service.errors import DeadlineExceededError, InvalidOptionError
from ghn_service.graph.architecture import ArchitectureGraph
from ghn_service.graph.onnx.reader import read_onnx
from ghn_service.predictor import READING, PlannedTransfer, PredictionOptions, plan_source
from ghn_service.server.access import peer_identity
from ghn_service.server.admission import Budget, Request, Turns
from ghn_service.server.messages import (
    decode_dtype,
    decode_head,
    decode_low_rank,
    decode_options,
    decode_source,
    encode_analysis,
    encode_models,
    encode_progress,
    encode_server_info,
    encode_trust,
)
from ghn_service.server.models import LoadedModel, ModelRegistry
from ghn_service.server.queue import Job, JobState, StageCallback, WorkQueue
from ghn_service.server.reply import (
    VERSION,
    Reply,
    encode_reply,
    encode_values,
    expected_bytes,
    prediction_memory,
)
from ghn_service.server.settings import MEBIBYTE, Settings
from ghn_service.server.sharing import SharedReplies, file_key, reply_key
from ghn_service.server.watchdog import Watchdog
from ghn_service.transfer.library import AUTO, Library

Events = Iterator[ghn_pb2.PredictWeightsResponse | bytes]

READERS = 2
"""Files that are read at once: reading is Python's work, which does not go faster in more threads."""


class GhnService(ghn_pb2_grpc.GhnServiceServicer):
    """Answers the calls of ``ghn.v1.GhnService``; ``CallInterceptor`` names requests and maps errors.

    Args:
        settings: Limits.
        models: The hypernetworks.
        sources: Trained networks that weights are taken from.
        work_queue: Where predictions wait.
        memory: What requests hold memory of.
        replies: Predictions that are shared.
        watchdog: Ends streams that stand still.
    """

    def __init__(
        self,
        settings: Settings,
        models: ModelRegistry,
        sources: Library,
        work_queue: WorkQueue,
        memory: Budget,
        replies: SharedReplies,
        watchdog: Watchdog,
    ) -> None:
        self.settings = settings
        self.limits = settings.limits
        self.models = models
        self.sources = sources
        self.work_queue = work_queue
        self.memory = memory
        self.replies = replies
        self.watchdog = watchdog
        self.readers = Turns(READERS)
        self.started = time.monotonic()

    def PredictWeights(  # type: ignore[override]  # noqa: N802
        self, request: ghn_pb2.PredictWeightsRequest, context: grpc.ServicerContext
    ) -> Events:
        """Predicts every trainable tensor of an architecture; chunks are serialised already."""
        options = decode_options(request)
        model = self.models.get(request.model)
        with self._admit(request, context) as admitted:
            start = time.monotonic()
            with self._prediction(admitted, request, model, options) as job:
                seconds = {READING: time.monotonic() - start, "waiting": 0.0}
                was_there, start = job.state is JobState.ENDED, time.monotonic()
                for progress in self.work_queue.follow(job, admitted):
                    yield encode_progress(progress)
                reply = job.result()
                if was_there:
                    seconds |= dict.fromkeys(reply.result.seconds, 0.0)
                else:
                    seconds |= {"waiting": max(0.0, job.started - start), **reply.result.seconds}
                yield ghn_pb2.PredictWeightsResponse(
                    header=ghn_pb2.StreamHeader(request_id=request.request_id, total_bytes=reply.num_bytes)
                )
                start = time.monotonic()
                with self.watchdog.watch_stream(context.cancel, deadline=admitted.deadline) as watch:
                    values = encode_values(reply.result.parameters, reply.result.statistics)
                    for chunk in encode_chunks(itertools.chain([reply.header], values)):
                        if time.monotonic() > admitted.deadline:
                            raise DeadlineExceededError("the request ran out of time while its weights were sent")
                        yield chunk
                        watch.touch(len(chunk))
                    seconds["streaming"] = time.monotonic() - start
                    yield ghn_pb2.PredictWeightsResponse(
                        trailer=ghn_pb2.StreamTrailer(
                            seconds=seconds, report_json=reply.report_json, trust=encode_trust(reply.result.trust)
                        )
                    )

    def AnalyzeArchitecture(  # noqa: N802
        self, request: ghn_pb2.AnalyzeArchitectureRequest, context: grpc.ServicerContext
    ) -> ghn_pb2.AnalyzeArchitectureResponse:
        """Reads an architecture and says what a prediction would do; predicts only where ranks are asked for."""
        dtype = decode_dtype(request.dtype)
        low_rank = decode_low_rank(request.low_rank, with_curves=True) if request.HasField("low_rank") else None
        head = decode_head(request.head)
        model = self.models.get(request.model)
        with self._admit(request, context) as admitted:
            record = None
            if low_rank is not None:
                options = PredictionOptions(low_rank=low_rank, head=head)
                with self._prediction(admitted, request, model, options) as job:
                    for _ in self.work_queue.follow(job, admitted):
                        pass
                    record = job.result().result.low_rank
            with self.readers.turn(admitted):
                graph, transfer = self._read(admitted, request)
                analysis = model.predictors[0].analyze(graph, transfer=transfer, head=head)
                analysis = replace(analysis, low_rank=record)
                admitted.check()
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

    @contextmanager
    def _admit(
        self,
        request: ghn_pb2.PredictWeightsRequest | ghn_pb2.AnalyzeArchitectureRequest,
        context: grpc.ServicerContext,
    ) -> Iterator[Request]:
        """A request until the client or the server gives it up; its message counts as memory for as long."""
        remaining_s = context.time_remaining()
        limit_s = self.settings.max_seconds
        deadline = time.monotonic() + (limit_s if remaining_s is None else min(limit_s, remaining_s))
        message_bytes = 2 * request.ByteSize()  # the message, and its file as bytes
        with Request(self.memory, peer_identity(context), deadline, message_bytes) as admitted:
            if not context.add_callback(admitted.cancel):
                admitted.cancel()  # the client has gone already
            yield admitted

    @contextmanager
    def _prediction(
        self,
        admitted: Request,
        request: ghn_pb2.PredictWeightsRequest | ghn_pb2.AnalyzeArchitectureRequest,
        model: LoadedModel,
        options: PredictionOptions,
    ) -> Iterator[Job[Reply]]:
        """The job that makes the reply, or has made it: of an equal request if there is one, else a new one."""
        source = self._source_key(request)
        file = file_key(request.architecture.onnx_model, model, options, source)
        shared = self.replies.find(file, admitted)
        if shared is None:
            with self.readers.turn(admitted):
                shared = self.replies.find(file, admitted)  # an equal request may have been read meanwhile
                if shared is None:
                    graph, transfer = self._read(admitted, request)
                    _check_include(graph, options)
                    make = partial(_predict, model, graph, options, transfer)
                    num_bytes = prediction_memory(graph, options, model, transfer)
                    key = file if source else reply_key(graph, model, options)
                    shared = self.replies.find_or_start(file, key, admitted, num_bytes, make)
        try:
            yield shared.job
        finally:
            self.replies.leave(shared)

    def _source_key(self, request: ghn_pb2.PredictWeightsRequest | ghn_pb2.AnalyzeArchitectureRequest) -> str:
        """What a reply depends on of the source of its request; "" without one."""
        if not request.HasField("source"):
            return ""
        options = decode_source(request.source)
        return repr((options, self.sources.digest(options[0]) or uuid.uuid4().hex))

    def _read(
        self, admitted: Request, request: ghn_pb2.PredictWeightsRequest | ghn_pb2.AnalyzeArchitectureRequest
    ) -> tuple[ArchitectureGraph, PlannedTransfer | None]:
        """The architecture of a request, and what its source gives if it names one; in a turn of the readers."""
        data = request.architecture.onnx_model
        num_bytes = min(160 * len(data), 4 * len(data) + 256 * MEBIBYTE)  # small messages take 100 times their bytes
        with admitted.hold(num_bytes):
            graph = read_onnx(data, limits=self.limits, check=admitted.check)
        if not request.HasField("source"):
            return graph, None
        name, head, post_process = decode_source(request.source)
        if head == "auto" and request.head == ghn_pb2.HEAD_RESET:
            head = "reset"  # who wants a new class layer does not want the source's
        names = [summary.name for summary in self.sources.summaries()] if name == AUTO else [name]
        with admitted.hold(sum(map(self.sources.size, names))):
            transfer, reasons = plan_source(
                self.sources,
                name,
                data,
                head=head,
                post_process=post_process,
                limits=self.limits,
                parameters=tuple(graph.parameters()),
                check=admitted.check,
            )
        return replace(graph, warnings=(*graph.warnings, *reasons)), transfer


def _check_include(graph: ArchitectureGraph, options: PredictionOptions) -> None:
    names = [spec.name for spec in graph.parameters()]
    if not any(options.includes(name) for name in names):
        raise InvalidOptionError(
            f"none of the {len(names)} tensors matches {', '.join(options.include)}", field="include"
        )


def _predict(
    model: LoadedModel,
    graph: ArchitectureGraph,
    options: PredictionOptions,
    transfer: PlannedTransfer | None,
    device_index: int,
    on_stage: StageCallback,
) -> Reply:
    """The work of one job, on a worker's thread."""
    result = model.predictors[device_index].run(graph, options=options, on_stage=on_stage, transfer=transfer)
    return encode_reply(result, options, model)
