"""Queue, deadlines, cancellation and readers that stop: what one client does must not harm another."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import grpc
import pytest

from ghn_client.wire import ghn_pb2
from tests.server.fake_predictor import (
    FakePredictor,
    Gate,
    code_of,
    connect,
    fake_server,
    predict_request,
    receive_file,
)
from tests.server.patience import PATIENCE_S, wait_until
from tests.server.small_models import LARGE, TINY

Code = grpc.StatusCode


def next_progress(events: grpc.Call) -> ghn_pb2.Progress:
    return next(iter(events)).progress


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(tmp_path: Path) -> None:
    gate = Gate()
    with fake_server(tmp_path, FakePredictor(gate), max_queue=0) as server, connect(server) as stub:
        running = stub.PredictWeights(predict_request(TINY))
        assert gate.entered.wait(PATIENCE_S)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.PredictWeights(predict_request(TINY, seed=1)))
        gate.opened.set()
        assert caught.value.code() is Code.RESOURCE_EXHAUSTED
        assert "grpc-retry-pushback-ms" in {key for key, _ in caught.value.trailing_metadata()}
        assert receive_file(running)


def test_a_waiting_request_hears_its_place(tmp_path: Path) -> None:
    gate = Gate()
    with fake_server(tmp_path, FakePredictor(gate)) as server, connect(server) as stub:
        streams = []
        for place in range(3):
            streams.append(stub.PredictWeights(predict_request(TINY, seed=place)))
            first = next_progress(streams[-1])
            assert gate.entered.wait(PATIENCE_S)
            if place:
                assert (first.stage, first.queue_position) == (ghn_pb2.STAGE_QUEUED, place - 1)
        gate.opened.set()
        assert all(receive_file(stream) for stream in streams)


def test_a_deadline_in_the_queue(tmp_path: Path) -> None:
    gate = Gate()
    predictor = FakePredictor(gate)
    with fake_server(tmp_path, predictor) as server, connect(server) as stub:
        running = stub.PredictWeights(predict_request(TINY))
        assert gate.entered.wait(PATIENCE_S)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.PredictWeights(predict_request(TINY, seed=1), timeout=0.2))
        wait_until(lambda: not server.work_queue.num_waiting)
        gate.opened.set()
        assert caught.value.code() is Code.DEADLINE_EXCEEDED
        assert receive_file(running)
    assert predictor.num_runs == 1


def test_the_servers_own_limit_of_time(tmp_path: Path) -> None:
    gate = Gate()
    with fake_server(tmp_path, FakePredictor(gate), max_seconds=0.3) as server, connect(server) as stub:
        assert code_of(stub.PredictWeights(predict_request(TINY))) is Code.DEADLINE_EXCEEDED
        gate.opened.set()
        assert receive_file(stub.PredictWeights(predict_request(TINY), timeout=PATIENCE_S))


def test_cancelling_a_computation_frees_the_device(tmp_path: Path) -> None:
    gate = Gate()
    predictor = FakePredictor(gate)
    with fake_server(tmp_path, predictor, max_queue=0) as server, connect(server) as stub:
        running = stub.PredictWeights(predict_request(TINY))
        assert gate.entered.wait(PATIENCE_S)
        running.cancel()
        predictor.before_decoding = lambda on_stage: None
        wait_until(lambda: code_of(stub.PredictWeights(predict_request(TINY))) is Code.OK)


def test_cancelling_a_stream_frees_its_place(tmp_path: Path) -> None:
    with fake_server(tmp_path, max_queue=0) as server, connect(server) as stub:
        for _ in range(3):
            stream = stub.PredictWeights(predict_request(LARGE))
            for event in stream:
                if event.WhichOneof("event") == "chunk":
                    break
            stream.cancel()
            wait_until(lambda: code_of(stub.PredictWeights(predict_request(TINY))) is Code.OK)


def test_a_client_that_never_reads_is_cut_off(tmp_path: Path) -> None:
    with (
        fake_server(tmp_path, send_idle_seconds=0.5) as server,
        connect(server) as stub,
    ):
        sleeper = stub.PredictWeights(predict_request(LARGE))
        next(iter(sleeper))
        assert code_of(stub.PredictWeights(predict_request(TINY))) is Code.OK
        wait_until(lambda: server.gate.places["prediction"].used == 0)
        assert code_of(sleeper) in {Code.CANCELLED, Code.DEADLINE_EXCEEDED}


def test_a_slow_reader_gets_everything(tmp_path: Path) -> None:
    with fake_server(tmp_path, send_idle_seconds=5.0) as server, connect(server) as stub:
        size = 0
        for event in stub.PredictWeights(predict_request(LARGE)):
            size += len(event.chunk.data)
            time.sleep(0.005)
        assert event.WhichOneof("event") == "trailer"
        assert size > 48 << 20


def test_health_and_lists_answer_while_the_device_is_busy(tmp_path: Path) -> None:
    gate = Gate()
    with fake_server(tmp_path, FakePredictor(gate)) as server, connect(server) as stub:
        running = stub.PredictWeights(predict_request(TINY))
        assert gate.entered.wait(PATIENCE_S)
        assert stub.ListModels(ghn_pb2.ListModelsRequest(), timeout=PATIENCE_S).models
        gate.opened.set()
        assert receive_file(running)


def test_predictions_never_overlap_on_a_device(tmp_path: Path) -> None:
    lock = threading.Lock()

    def exclusive(on_stage: object) -> None:
        assert lock.acquire(blocking=False), "two predictions at once"
        time.sleep(0.01)
        lock.release()

    predictor = FakePredictor(exclusive)
    with fake_server(tmp_path, predictor) as server, connect(server) as stub:
        streams = [stub.PredictWeights(predict_request(TINY, seed=seed)) for seed in range(8)]
        assert all(receive_file(stream) for stream in streams)
    assert set(predictor.threads) == {"ghn-worker-0"}
