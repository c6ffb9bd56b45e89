"""The servicer: one method per rpc, each a few lines from message to message."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import grpc

from ghn_client.wire import ghn_pb2
from ghn_client.wire.codec import SERVICE, encode_chunks, serialize_event
from ghn_service.errors import DeadlineExceededError, InvalidOptionError, RequestCancelledError
from ghn_service.graph.architecture import ArchitectureGraph
from ghn_service.graph.onnx.reader import read_onnx
from ghn_service.predictor import READING, PredictionOptions, PredictionResult
from ghn_service.server.logs import current_request_id
from ghn_service.server.messages import (
    decode_dtype,
    decode_low_rank,
    decode_options,
    encode_analysis,
    encode_models,
    encode_progress,
    encode_server_info,
)
from ghn_service.server.models import LoadedModel, ModelRegistry
from ghn_service.server.reply import VERSION, encode_report, encode_result_header, encode_values, expected_bytes
from ghn_service.server.settings import Settings
from ghn_service.server.watchdog import Watchdog
from ghn_service.server.work_queue import Admission, Job, ResultT, StageCallback, WorkQueue

Events = Iterator[ghn_pb2.PredictWeightsResponse | bytes]


class GhnService:
    """Answers the calls of ``ghn.v1.GhnService``; errors are mapped by the interceptor.

    Args:
        settings: Limits.
        models: The hypernetworks.
        work_queue: Where predictions wait.
        watchdog: Ends streams that stand still.
    """

    def __init__(self, settings: Settings, models: ModelRegistry, work_queue: WorkQueue, watchdog: Watchdog) -> None:
        self.settings = settings
        self.models = models
        self.work_queue = work_queue
        self.watchdog = watchdog
        self.started = time.monotonic()

    def predict_weights(self, request: ghn_pb2.PredictWeightsRequest, context: grpc.ServicerContext) -> Events:
        """Predicts every trainable tensor of an architecture."""
        options = decode_options(request)
        model = self.models.get(request.model)
        deadline = self._deadline(context)
        with self.work_queue.admit() as admission:
            start = time.perf_counter()
            graph = self._read(request.architecture)
            reading_s = time.perf_counter() - start
            if options.include and not any(options.includes(spec.name) for spec in graph.parameters()):
                raise InvalidOptionError(
                    f"none of the {len(list(graph.parameters()))} tensors matches {', '.join(options.include)}",
                    field="include",
                )
            job = _submit(admission, partial(_predict, model, graph, options), context, deadline)
            for progress in job.progress(lambda: self.work_queue.position(job)):
                yield encode_progress(progress)
            result = job.result()
            header = encode_result_header(result, options, model)
            total_bytes = len(header) + result.parameters.num_bytes
            yield ghn_pb2.PredictWeightsResponse(
                header=ghn_pb2.StreamHeader(request_id=current_request_id(), total_bytes=total_bytes)
            )
            start = time.perf_counter()
            with self.watchdog.watch(context.cancel, deadline=deadline) as watch:
                for chunk in encode_chunks(itertools.chain([header], encode_values(result.parameters))):
                    if time.monotonic() > deadline:
                        raise DeadlineExceededError("the request ran out of time while its weights were sent")
                    yield chunk
                    watch.touch()
                streaming_s = time.perf_counter() - start
                seconds = {READING: reading_s, "waiting": job.wait_s, **result.seconds, "streaming": streaming_s}
                report_json = encode_report(result, options, model)
                yield ghn_pb2.PredictWeightsResponse(
                    trailer=ghn_pb2.StreamTrailer(seconds=seconds, report_json=report_json)
                )

    def analyze_architecture(
        self, request: ghn_pb2.AnalyzeArchitectureRequest, context: grpc.ServicerContext
    ) -> ghn_pb2.AnalyzeArchitectureResponse:
        """Reads an architecture and says what a prediction would do; predicts only where ranks are asked for."""
        dtype = decode_dtype(request.dtype)
        low_rank = decode_low_rank(request.low_rank, with_curves=True) if request.HasField("low_rank") else None
        model = self.models.get(request.model)
        graph = self._read(request.architecture)
        analysis = model.predictors[0].analyze(graph)
        if low_rank is not None:
            with self.work_queue.admit() as admission:
                work = partial(_predict, model, graph, PredictionOptions(low_rank=low_rank))
                job = _submit(admission, work, context, self._deadline(context))
                for _ in job.progress(lambda: self.work_queue.position(job)):
                    pass
                analysis = replace(analysis, low_rank=job.result().low_rank)
        return encode_analysis(
            analysis, model, total_bytes=expected_bytes(analysis, dtype, model), request_id=current_request_id()
        )

    def list_models(
        self, request: ghn_pb2.ListModelsRequest, context: grpc.ServicerContext
    ) -> ghn_pb2.ListModelsResponse:
        """Lists the hypernetworks that are loaded."""
        return encode_models(self.models.loaded(), default_name=self.models.default_name)

    def get_server_info(
        self, request: ghn_pb2.GetServerInfoRequest, context: grpc.ServicerContext
    ) -> ghn_pb2.GetServerInfoResponse:
        """Tells version, devices and limits."""
        uptime_s = time.monotonic() - self.started
        return encode_server_info(self.settings, self.models.devices, version=VERSION, uptime_s=uptime_s)

    def _deadline(self, context: grpc.ServicerContext) -> float:
        """``time.monotonic()`` at which the client or the server gives up."""
        remaining = context.time_remaining()
        limit = self.settings.max_seconds
        return time.monotonic() + (limit if remaining is None else min(limit, remaining))

    def _read(self, architecture: ghn_pb2.Architecture) -> ArchitectureGraph:
        return read_onnx(architecture.onnx_model, limits=self.settings.limits)


def method_handlers(service: GhnService) -> grpc.GenericRpcHandler:
    """The servicer as gRPC takes it.

    Unlike the generated ``add_GhnServiceServicer_to_server``, it copies chunks only once (``wire.codec``).
    """
    return grpc.method_handlers_generic_handler(
        SERVICE,
        {
            "PredictWeights": grpc.unary_stream_rpc_method_handler(
                service.predict_weights,
                request_deserializer=ghn_pb2.PredictWeightsRequest.FromString,
                response_serializer=serialize_event,
            ),
            "AnalyzeArchitecture": grpc.unary_unary_rpc_method_handler(
                service.analyze_architecture,
                request_deserializer=ghn_pb2.AnalyzeArchitectureRequest.FromString,
                response_serializer=ghn_pb2.AnalyzeArchitectureResponse.SerializeToString,
            ),
            "ListModels": grpc.unary_unary_rpc_method_handler(
                service.list_models,
                request_deserializer=ghn_pb2.ListModelsRequest.FromString,
                response_serializer=ghn_pb2.ListModelsResponse.SerializeToString,
            ),
            "GetServerInfo": grpc.unary_unary_rpc_method_handler(
                service.get_server_info,
                request_deserializer=ghn_pb2.GetServerInfoRequest.FromString,
                response_serializer=ghn_pb2.GetServerInfoResponse.SerializeToString,
            ),
        },
    )


def _submit(
    admission: Admission, work: Callable[[int, StageCallback], ResultT], context: grpc.ServicerContext, deadline: float
) -> Job[ResultT]:
    """Puts work into the queue, to be given up when the client hangs up."""
    job = Job(work, deadline=deadline)
    if not context.add_callback(job.cancel):
        raise RequestCancelledError("the request was cancelled")
    admission.submit(job)
    return job


def _predict(
    model: LoadedModel,
    graph: ArchitectureGraph,
    options: PredictionOptions,
    device_index: int,
    on_stage: StageCallback,
) -> PredictionResult:
    """The work of one job, on a worker's thread."""
    return model.predictors[device_index].run(graph, options=options, on_stage=on_stage)
