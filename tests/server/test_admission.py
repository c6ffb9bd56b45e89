"""Who may hold how much: threads, memory and time, for all together and for one peer."""

from __future__ import annotations

import gc
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import onnx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st

from ghn_client.wire import ghn_pb2
from ghn_service.errors import InvalidOptionError, LimitExceededError, OverloadedError
from ghn_service.graph.onnx.reader import read_onnx
from ghn_service.predictor import PredictionOptions
from ghn_service.server.admission import (
    ARRIVALS,
    POLL_S,
    SERVER,
    SIDE_KINDS,
    Budget,
    Holding,
    Kind,
    default_memory_bytes,
)
from ghn_service.server.app import RunningServer
from ghn_service.server.reply import prediction_memory
from ghn_service.server.settings import load_settings
from tests.graph.test_onnx_limits import densely_connected
from tests.server.fake_predictor import (
    SUMMARY,
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
from tests.server.strangers import PREFACE, SETTINGS, is_healthy, say

Code = grpc.StatusCode
GIBIBYTE = 2**30
INITIAL_WINDOW_SIZE = 4
"""Number of the HTTP/2 setting: bytes that a client may send of a call before the server asks for more."""


# ---- threads --------------------------------------------------------------------------------------------------------


@contextmanager
def held(server: RunningServer, what: str, number: int) -> Iterator[list[grpc.Call]]:
    """Calls that are begun and then left alone: streams that say nothing, or requests that never come."""
    silence = threading.Event()

    def nothing() -> Iterator[bytes]:
        silence.wait(PATIENCE_S)
        yield from ()

    with grpc.insecure_channel(server.address) as channel:
        if what == "reflection":
            begin = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
            calls = [begin(nothing()) for _ in range(number)]
        elif what == "watch":
            request = health_pb2.HealthCheckRequest(service="")
            calls = [health_pb2_grpc.HealthStub(channel).Watch(request) for _ in range(number)]
        else:
            method = {"predict": "ghn.v1.GhnService/PredictWeights", "check": "grpc.health.v1.Health/Check"}[what]
            calls = [channel.stream_stream(f"/{method}")(nothing()) for _ in range(number)]
        try:
            yield calls
        finally:
            silence.set()
            for call in calls:
                call.cancel()


@pytest.mark.parametrize("what", ["reflection", "watch", "check", "predict"])
def test_idle_calls_leave_health_and_predictions_alone(tmp_path: Path, what: str) -> None:
    with fake_server(tmp_path, reflection=True) as server, held(server, what, 300), connect(server) as stub:
        with grpc.insecure_channel(server.address) as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            if what != "check":  # one peer has its share of them
                assert check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S).status
        if what != "predict":
            assert receive_file(stub.PredictWeights(predict_request(TINY), timeout=PATIENCE_S))


def test_a_request_that_never_comes_gives_its_place_back(tmp_path: Path) -> None:
    with fake_server(tmp_path, max_calls=1, send_idle_seconds=5.0) as server, connect(server) as stub:
        with held(server, "predict", 1) as (call,):
            wait_until(lambda: server.gate.places["prediction"].used == 1)
            assert code_of(stub.PredictWeights(predict_request(TINY))) is Code.RESOURCE_EXHAUSTED
            wait_until(lambda: not call.is_active())
        wait_until(lambda: server.gate.places["prediction"].used == 0)
        assert receive_file(stub.PredictWeights(predict_request(TINY), timeout=PATIENCE_S))


@pytest.mark.parametrize("peer_share", [0.5, 1.0])
def test_few_requests_arrive_at_once_and_the_others_wait(tmp_path: Path, peer_share: float) -> None:
    most = int(peer_share * ARRIVALS)
    with fake_server(tmp_path, max_peer_share=peer_share) as server, connect(server) as stub:
        with held(server, "predict", most + 2):
            wait_until(lambda: server.gate.places["prediction"].used == most + 2)
            wait_until(lambda: server.gate.arriving["prediction"].used == most)
            waiting = stub.ListModels.future(ghn_pb2.ListModelsRequest(), timeout=PATIENCE_S)
            with pytest.raises(grpc.FutureTimeoutError):
                waiting.result(timeout=5 * POLL_S)
            assert is_healthy(server.address)
        assert waiting.result().models
        wait_until(lambda: server.gate.arriving["prediction"].used == 0)


def test_little_is_taken_of_a_call_before_it_may_arrive(tmp_path: Path) -> None:
    with (
        fake_server(tmp_path) as server,
        say(server.address, PREFACE + SETTINGS) as connection,
        connection.makefile("rb") as answer,
    ):
        settings = answer.read(int.from_bytes(answer.read(9)[:3], "big"))
    values = dict(struct.unpack(">HI", settings[start : start + 6]) for start in range(0, len(settings), 6))
    assert values.get(INITIAL_WINDOW_SIZE, 0) <= 64 * 1024


def test_a_request_that_waits_to_arrive_is_given_up_in_time(tmp_path: Path) -> None:
    with fake_server(tmp_path, send_idle_seconds=1.0) as server:
        peer = server.gate.arriving["prediction"]
        holdings = [peer.hold(1, f"peer {number}") for number in range(ARRIVALS)]
        with connect(server) as stub:
            assert code_of(lambda: stub.ListModels(ghn_pb2.ListModelsRequest())) is Code.CANCELLED
            for holding in holdings:
                holding.shrink(0)
            assert stub.ListModels(ghn_pb2.ListModelsRequest(), timeout=PATIENCE_S).models


def test_what_arrives_by_default_fits_beside_the_budget() -> None:
    kinds = (*SIDE_KINDS, Kind("prediction", load_settings().max_calls, 1.0))
    assert sum(min(kind.places, ARRIVALS) for kind in kinds) * load_settings().max_request_bytes <= GIBIBYTE // 2


def test_a_refused_request_leaves_nothing_to_the_collector(tmp_path: Path) -> None:
    request = predict_request(TINY, request_id="two\nlines")
    with fake_server(tmp_path) as server, connect(server) as stub:
        gc.disable()
        try:
            assert code_of(stub.PredictWeights(request)) is Code.INVALID_ARGUMENT
            wait_until(lambda: not any(type(item) is InvalidOptionError for item in gc.get_objects()))
        finally:
            gc.enable()


def test_held_watches_do_not_delay_a_stop(tmp_path: Path) -> None:
    with fake_server(tmp_path) as server, held(server, "watch", 3):
        start = time.monotonic()
        server.stop(grace_s=PATIENCE_S)
        assert time.monotonic() - start < PATIENCE_S / 2


def test_a_stop_does_not_wait_for_calls_that_are_never_handed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_server(tmp_path) as server:
        stop, ended, graces = server._server.stop, threading.Event(), []

        def stop_late(grace: float | None) -> threading.Event:
            graces.append(grace)
            if grace == 0.0:
                stop(grace).wait()
                ended.set()
            return ended

        monkeypatch.setattr(server._server, "stop", stop_late)
        server.stop(grace_s=PATIENCE_S)
        assert graces[0] == PATIENCE_S
        assert graces[-1] == 0.0


# ---- reading --------------------------------------------------------------------------------------------------------


def test_analysis_ends_with_its_client(tmp_path: Path) -> None:
    request = ghn_pb2.AnalyzeArchitectureRequest(architecture=ghn_pb2.Architecture(onnx_model=densely_connected(430)))
    with fake_server(tmp_path) as server, connect(server) as stub:
        calls = [stub.AnalyzeArchitecture.future(request, timeout=0.2) for _ in range(40)]
        assert {call.code() for call in calls} == {Code.DEADLINE_EXCEEDED}
        wait_until(lambda: server.gate.places["prediction"].used == 0)
        start = time.monotonic()
        assert stub.AnalyzeArchitecture(_analysis(TINY), timeout=PATIENCE_S).num_nodes
        assert time.monotonic() - start < PATIENCE_S / 2


def _analysis(model: bytes) -> ghn_pb2.AnalyzeArchitectureRequest:
    return ghn_pb2.AnalyzeArchitectureRequest(architecture=ghn_pb2.Architecture(onnx_model=model))


def test_analysis_takes_a_place(tmp_path: Path) -> None:
    gate = Gate()
    with fake_server(tmp_path, FakePredictor(gate), max_calls=1) as server, connect(server) as stub:
        running = stub.PredictWeights(predict_request(TINY))
        assert gate.entered.wait(PATIENCE_S)
        assert code_of(lambda: stub.AnalyzeArchitecture(_analysis(TINY))) is Code.RESOURCE_EXHAUSTED
        gate.opened.set()
        assert receive_file(running)


def test_reading_counts_as_memory(tmp_path: Path) -> None:
    with fake_server(tmp_path, memory_bytes=len(TINY) * 20) as server, connect(server) as stub:
        assert code_of(lambda: stub.AnalyzeArchitecture(_analysis(TINY))) is Code.RESOURCE_EXHAUSTED


def test_a_message_counts_as_memory_for_as_long_as_its_request_waits(tmp_path: Path) -> None:
    padded = onnx.load_from_string(TINY)
    padded.doc_string = "x" * (4 << 20)
    used = []
    for model in (TINY, padded.SerializeToString()):
        gate = Gate()
        with fake_server(tmp_path, FakePredictor(gate), cache_bytes=0) as server, connect(server) as stub:
            running = stub.PredictWeights(predict_request(model))
            assert gate.entered.wait(PATIENCE_S)
            used.append(server.memory.used)
            gate.opened.set()
            assert receive_file(running)
            wait_until(lambda: server.memory.used == 0)
    assert used[1] - used[0] >= 8 << 20


# ---- memory ---------------------------------------------------------------------------------------------------------


def asks_to_retry(error: grpc.RpcError) -> bool:
    return "grpc-retry-pushback-ms" in {key for key, _ in error.trailing_metadata()}


def test_too_large_alone_is_refused_for_good(tmp_path: Path) -> None:
    predictor = FakePredictor()
    with fake_server(tmp_path, predictor, memory_bytes=40 << 20) as server, connect(server) as stub:
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.PredictWeights(predict_request(LARGE)))
        assert caught.value.code() is Code.RESOURCE_EXHAUSTED
        assert not asks_to_retry(caught.value)
        assert receive_file(stub.PredictWeights(predict_request(TINY)))
    assert predictor.num_runs == 1


def test_too_large_now_is_refused_for_now(tmp_path: Path) -> None:
    settings = {"memory_bytes": 200 << 20, "max_peer_share": 1.0, "cache_bytes": 0}
    with fake_server(tmp_path, **settings) as server, connect(server) as stub:
        first = stub.PredictWeights(predict_request(LARGE))
        while next(first).WhichOneof("event") != "header":
            pass
        streams = [stub.PredictWeights(predict_request(LARGE, seed=seed)) for seed in (1, 2, 3)]
        codes = []
        for stream in streams:
            try:
                while next(stream).WhichOneof("event") != "header":
                    pass
            except grpc.RpcError as error:
                codes.append((error.code(), asks_to_retry(error)))
        assert codes
        assert set(codes) == {(Code.RESOURCE_EXHAUSTED, True)}
        for stream in (first, *streams):
            stream.cancel()
        wait_until(lambda: server.memory.used == 0)
        assert receive_file(stub.PredictWeights(predict_request(LARGE, seed=4)))


def test_one_peer_leaves_memory_to_the_others() -> None:
    budget = Budget("bytes", 100, 0.5)
    first = budget.hold(80, "a")  # who holds nothing may take any part
    with pytest.raises(OverloadedError):
        budget.hold(1, "a")
    assert budget.hold(20, "b")
    first.shrink(30)
    assert budget.hold(20, "a")
    with pytest.raises(OverloadedError):
        budget.hold(1, "a")
    with pytest.raises(LimitExceededError):
        budget.hold(101, "c")


@given(st.lists(st.tuples(st.sampled_from(["hold", "shrink", "move"]), st.integers(0, 60), st.sampled_from("abc"))))
def test_a_budget_adds_up(steps: list[tuple[str, int, str]]) -> None:
    budget, held_now = Budget("bytes", 100, 0.5), list[Holding]()
    amounts: list[int] = []
    for action, amount, peer in steps:
        if action == "hold":
            try:
                held_now.append(budget.hold(amount, peer))
                amounts.append(amount)
            except OverloadedError:
                assert sum(amounts) + amount > 50
        elif held_now and action == "shrink":
            held_now[amount % len(held_now)].shrink(amount)
            amounts[amount % len(amounts)] = min(amount, amounts[amount % len(amounts)])
        elif held_now:
            held_now[amount % len(held_now)].move(peer)
        assert budget.used == sum(amounts) <= 100
    for holding in held_now:
        holding.shrink(0)
    assert budget.used == 0
    assert budget.hold(100, SERVER)


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": f"{8 * GIBIBYTE}"}, 8 * GIBIBYTE),
        (
            {
                "proc/self/cgroup": "0::/kubepods/pod/container",
                "sys/fs/cgroup/kubepods/pod/container/memory.max": "max",
                "sys/fs/cgroup/kubepods/pod/memory.max": f"{GIBIBYTE}",
                "sys/fs/cgroup/kubepods/memory.max": f"{3 * GIBIBYTE}",
            },
            GIBIBYTE,
        ),
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/docker/abc",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GIBIBYTE}",
            },
            2 * GIBIBYTE,
        ),
        ({"proc/self/cgroup": "4:memory:/", "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2**63 - 4096}"}, None),
        ({}, None),
    ],
    ids=["version 2", "an ancestor", "version 1", "version 1 without a limit", "none"],
)
def test_the_budget_follows_the_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], limit: int | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    physical = 64 * GIBIBYTE
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": physical // 4096}[name])
    available = limit or physical
    assert default_memory_bytes(0, root=tmp_path) == max(available * 3 // 4 - GIBIBYTE // 2, available // 8)
    assert default_memory_bytes(10**12, root=tmp_path) == available // 8


def test_the_expected_memory_covers_the_reply() -> None:
    graph = read_onnx(LARGE)
    num_elements = graph.num_parameters
    model = FakeModel()
    for dtype, size in (("float32", 4), ("float16", 2)):
        assert prediction_memory(graph, PredictionOptions(dtype=dtype), model) > num_elements * size  # type: ignore[arg-type]
    part = PredictionOptions(include=("layers.1.bias",))
    assert prediction_memory(graph, part, model) < num_elements * 4  # type: ignore[arg-type]


class FakeModel:
    """What ``prediction_memory`` looks at."""

    summary = SUMMARY


# ---- time -----------------------------------------------------------------------------------------------------------


def test_a_drip_reader_is_cut_off(tmp_path: Path) -> None:
    settings = {"send_idle_seconds": 1.0, "min_bytes_per_second": 100 << 20}
    with fake_server(tmp_path, **settings) as server, connect(server) as stub:

        def drip() -> Iterator[ghn_pb2.PredictWeightsResponse]:
            for event in stub.PredictWeights(predict_request(LARGE)):
                time.sleep(0.1)
                yield event

        assert code_of(drip()) is Code.CANCELLED


def test_a_hung_worker_turns_readiness_off_until_it_comes_back(tmp_path: Path) -> None:
    opened, entered = threading.Event(), threading.Event()

    def hang(on_stage: object) -> None:
        entered.set()
        opened.wait(PATIENCE_S)

    def status(server: RunningServer) -> int:
        with grpc.insecure_channel(server.address) as channel:
            request = health_pb2.HealthCheckRequest(service="ghn.v1.GhnService")
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=PATIENCE_S)
        return int(answer.status)

    settings = {"worker_seconds": 0.3, "send_idle_seconds": 1.0}
    with fake_server(tmp_path, FakePredictor(hang), **settings) as server, connect(server) as stub:
        stream = stub.PredictWeights(predict_request(TINY))
        assert entered.wait(PATIENCE_S)
        wait_until(lambda: status(server) == health_pb2.HealthCheckResponse.NOT_SERVING)
        opened.set()
        assert receive_file(stream)
        wait_until(lambda: status(server) == health_pb2.HealthCheckResponse.SERVING)
