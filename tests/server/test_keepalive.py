"""Connections that are silent, dead or old: which calls survive, and which end without anybody's word."""

from __future__ import annotations

import time
from pathlib import Path

import grpc
import pytest

from ghn_client.wire.ghn_pb2_grpc import GhnServiceStub
from tests.server.fake_predictor import FakePredictor, Gate, connect, fake_server, predict_request, receive_file
from tests.server.freezing_proxy import freezing_proxy
from tests.server.patience import PATIENCE_S, wait_until
from tests.server.small_models import TINY

PING_MS = 50
EAGER = {"grpc.keepalive_time_ms": PING_MS, "grpc.http2.max_pings_without_data": 0}


def test_a_waiting_client_may_ping_as_often_as_allowed(tmp_path: Path) -> None:
    gate = Gate()
    with (
        fake_server(tmp_path, FakePredictor(gate), min_ping_seconds=0.0) as server,
        connect(server, **EAGER) as stub,
    ):
        running = stub.PredictWeights(predict_request(TINY))
        assert gate.entered.wait(PATIENCE_S)
        time.sleep(20 * PING_MS / 1000)
        gate.opened.set()
        assert receive_file(running)


def test_a_client_that_pings_too_often_is_sent_away(tmp_path: Path) -> None:
    gate = Gate()
    with (
        fake_server(tmp_path, FakePredictor(gate), min_ping_seconds=3600.0) as server,
        connect(server, **EAGER) as stub,
    ):
        with pytest.raises(grpc.RpcError) as caught:
            receive_file(stub.PredictWeights(predict_request(TINY), timeout=PATIENCE_S))
        gate.opened.set()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_the_work_for_a_client_that_vanished_ends(tmp_path: Path) -> None:
    gate = Gate()
    with (
        fake_server(tmp_path, FakePredictor(gate), keepalive_seconds=1.0, keepalive_timeout_seconds=0.2) as server,
        freezing_proxy(server.address) as proxy,
        grpc.insecure_channel(proxy.address) as channel,
    ):
        running = GhnServiceStub(channel).PredictWeights(predict_request(TINY))
        assert gate.entered.wait(PATIENCE_S)
        proxy.freeze()
        wait_until(lambda: gate.ended.is_set())
        running.cancel()


def test_calls_outlive_the_age_of_their_connection(tmp_path: Path) -> None:
    gate = Gate()
    with (
        fake_server(tmp_path, FakePredictor(gate), max_connection_seconds=0.2) as server,
        connect(server) as stub,
    ):
        running = stub.PredictWeights(predict_request(TINY))
        assert gate.entered.wait(PATIENCE_S)
        time.sleep(1.0)
        gate.opened.set()
        assert receive_file(running)
        assert receive_file(stub.PredictWeights(predict_request(TINY), wait_for_ready=True))
