"""What a reply is, whether its file is made while tensors are written or at the end."""

from __future__ import annotations

import gc
import hashlib
import threading

import pytest
import torch

from ghn_service.graph.onnx.reader import read_onnx
from ghn_service.predictor import PredictionOptions, PredictionResult
from ghn_service.server import reply
from ghn_service.server.models import LoadedModel
from ghn_service.server.reply import Reply, ReplyBuilder
from tests.server.fake_predictor import SUMMARY, FakePredictor
from tests.server.patience import wait_until
from tests.server.small_models import TINY

GRAPH = read_onnx(TINY)
MODEL = LoadedModel("fake", SUMMARY, (), ("cpu",))
OPTIONS = PredictionOptions(seed=3)


def predict() -> PredictionResult:
    return FakePredictor().run(
        GRAPH, options=OPTIONS, on_stage=lambda name: None, on_written=lambda parameters, count: None
    )


def file_of(made: Reply) -> bytes:
    return made.file_header + b"".join(made.buffers)


def num_hashing_threads() -> int:
    gc.collect()
    return sum(thread.name == "ghn-sha256" for thread in threading.enumerate())


@pytest.fixture(params=[1, 40, 1 << 20], ids=["each", "some", "all"])
def hashed_from_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reply, "HASHED_FROM_BYTES", request.param)


@pytest.mark.usefixtures("hashed_from_bytes")
def test_a_file_made_while_tensors_are_written_is_that_made_at_the_end() -> None:
    result = predict()
    with ReplyBuilder(GRAPH, OPTIONS, MODEL) as early, ReplyBuilder(GRAPH, OPTIONS, MODEL) as late:
        for count in range(len(result.parameters) + 1):
            early.take_written(result.parameters, count)
        first, second = early.finish(result, request_id="r"), late.finish(result, request_id="r")
        assert file_of(first) == file_of(second)
        assert first.header == second.header
        digests = {first.sha256.hexdigest(), second.sha256.hexdigest()}
    assert digests == {hashlib.sha256(file_of(first)).hexdigest()}


def test_nothing_is_hashed_before_it_is_final(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reply, "HASHED_FROM_BYTES", 1)
    result = predict()
    final = {name: tensor.clone() for name, tensor in result.parameters.items()}
    for tensor in result.parameters.values():
        tensor.fill_(torch.nan)
    with ReplyBuilder(GRAPH, OPTIONS, MODEL) as builder:
        builder.take_written(result.parameters, 0)
        for count, (name, tensor) in enumerate(result.parameters.items(), start=1):
            tensor.copy_(final[name])
            builder.take_written(result.parameters, count)
        made = builder.finish(result, request_id="r")
        assert made.sha256.hexdigest() == hashlib.sha256(file_of(made)).hexdigest()


def test_a_reply_that_is_given_up_hashes_no_longer() -> None:
    before = num_hashing_threads()
    with ReplyBuilder(GRAPH, OPTIONS, MODEL) as builder:
        builder.take_written(predict().parameters, 0)
        assert num_hashing_threads() == before + 1
    assert num_hashing_threads() == before


def test_a_reply_that_is_forgotten_hashes_no_longer() -> None:
    before = num_hashing_threads()
    ReplyBuilder(GRAPH, OPTIONS, MODEL).take_written(predict().parameters, 0)
    wait_until(lambda: num_hashing_threads() == before)
