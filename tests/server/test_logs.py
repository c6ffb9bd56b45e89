"""Every call leaves one line with its identifier."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from ghn_service.server.logging import make_formatter
from tests.server.fake_predictor import FakePredictor, connect, fake_server, predict_request, raises, receive_file
from tests.server.patience import wait_until
from tests.server.small_models import TINY
from tests.server.strangers import hold_reflection


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What the service logs, as JSON lines."""
    logger, stream = logging.getLogger("ghn_service"), io.StringIO()
    handler, level = logging.StreamHandler(stream), logger.level
    handler.setFormatter(make_formatter("json"))
    logger.addHandler(handler)
    logger.setLevel("INFO")
    yield stream
    logger.removeHandler(handler)
    logger.setLevel(level)


def calls(log: io.StringIO) -> dict[str, dict[str, object]]:
    """The lines of calls, by identifier."""
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    return {line["request_id"]: line for line in lines if "code" in line}


def test_what_a_client_chose_cannot_move_a_terminal() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(make_formatter("console"))
    evil = "one\n2026-01-01 forged\x1b[2J\x9b31m\u2028\r"
    logger = logging.getLogger("another.program")
    logger.propagate = False
    logger.addHandler(handler)
    try:
        raise ValueError(evil)
    except ValueError:
        logger.exception("call: %s", evil, extra={"peer": evil})
    text = stream.getvalue()
    assert [sign for sign in text if not sign.isprintable() and sign != "\n"] == []
    assert text.splitlines()[0].count("forged") == 2  # the event and the peer; the traceback has lines of its own


def test_a_call_is_one_json_line(tmp_path: Path, log: io.StringIO) -> None:
    with fake_server(tmp_path) as server, connect(server) as stub:
        receive_file(stub.PredictWeights(predict_request(TINY, request_id="good")))
        with pytest.raises(grpc.RpcError):
            list(stub.PredictWeights(predict_request(b"", request_id="bad")))
        wait_until(lambda: len(calls(log)) == 2)
    assert {name: line["code"] for name, line in calls(log).items()} == {"good": "OK", "bad": "INVALID_ARGUMENT"}
    assert calls(log)["good"]["method"] == "PredictWeights"


def test_a_client_that_goes_away_is_no_fault_of_the_server(tmp_path: Path, log: io.StringIO) -> None:
    logging.getLogger("ghn_service").setLevel("DEBUG")
    with fake_server(tmp_path) as server, grpc.insecure_channel(server.address) as channel:
        held = hold_reflection(channel)
        assert next(held).list_services_response.service
        held.cancel()
        wait_until(lambda: bool(calls(log)))
    assert {line["code"] for line in calls(log).values()} == {"CANCELLED"}


def test_the_log_has_what_the_client_is_not_told(tmp_path: Path, log: io.StringIO) -> None:
    predictor = FakePredictor(before_decoding=raises(RuntimeError("the cause")))
    with fake_server(tmp_path, predictor) as server, connect(server) as stub:
        with pytest.raises(grpc.RpcError):
            list(stub.PredictWeights(predict_request(TINY, request_id="mine")))
        wait_until(lambda: "mine" in calls(log))
    assert "the cause" in str(calls(log)["mine"]["exception"])
