"""Equal requests are one prediction, and the last replies are kept; nobody can tell from the bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import onnx
import pytest

from ghn_client.wire import ghn_pb2
from ghn_service.transfer.library import Library
from tests.graph.onnx_models import Model
from tests.server.fake_predictor import FakePredictor, Gate, connect, fake_server, predict_request, raises, receive_file
from tests.server.patience import PATIENCE_S, wait_until
from tests.server.small_models import LARGE, TINY, linear_model

MEGABYTE = linear_model(512, 512)


def test_64_equal_requests_at_once_cost_one_prediction(tmp_path: Path) -> None:
    gate = Gate()
    predictor = FakePredictor(gate)
    with fake_server(tmp_path, cache_bytes=0) as plain, connect(plain) as stub:
        expected = receive_file(stub.PredictWeights(predict_request(MEGABYTE, seed=7)))
    with (
        fake_server(tmp_path, predictor, cache_bytes=0) as server,
        connect(server) as stub,
        ThreadPoolExecutor(64) as pool,
    ):
        files = [
            pool.submit(lambda: receive_file(stub.PredictWeights(predict_request(MEGABYTE, seed=7)))) for _ in range(64)
        ]
        wait_until(lambda: server.replies.num_followed == 63)
        gate.opened.set()
        assert {file.result(PATIENCE_S * 3) == expected for file in files} == {True}
        assert predictor.num_runs == 1
        wait_until(lambda: server.memory.used == 0)


def test_a_kept_reply_answers_the_next_request(tmp_path: Path) -> None:
    predictor = FakePredictor()
    with fake_server(tmp_path, predictor) as server, connect(server) as stub:
        first = receive_file(stub.PredictWeights(predict_request(TINY)))
        events = list(stub.PredictWeights(predict_request(TINY)))
        assert receive_file(events) == first
        assert events[-1].trailer.seconds["decoding"] == 0.0
    assert (predictor.num_runs, server.replies.num_hits) == (1, 1)


def renamed(model: bytes) -> bytes:
    """The same network with other names of values and nodes, and another text."""
    proto = onnx.load_model_from_string(model)
    for node in proto.graph.node:
        node.name = f"other_{node.name}"
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                names[index] = f"other_{name}" if name[0] in "ha" else name
    for output in proto.graph.output:
        output.name = f"other_{output.name}"
    proto.doc_string = "another text"
    data: bytes = proto.SerializeToString()
    return data


def test_what_does_not_show_in_the_reply_does_not_count(tmp_path: Path) -> None:
    predictor = FakePredictor()
    with fake_server(tmp_path, predictor) as server, connect(server) as stub:
        first = receive_file(stub.PredictWeights(predict_request(TINY, request_id="one")))
        assert receive_file(stub.PredictWeights(predict_request(renamed(TINY), request_id="two"))) == first
    assert predictor.num_runs == 1


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        (TINY, {"seed": 1}),
        (TINY, {"dtype": ghn_pb2.DATA_TYPE_FLOAT16}),
        (TINY, {"include": ["layers.0*"]}),
        (TINY, {"steps": [ghn_pb2.PostProcessingStep(name="noise")]}),
        (TINY, {"report": True}),
        (TINY, {"low_rank": ghn_pb2.LowRankOutput(rank=1)}),
        (TINY, {"model": "other"}),
        (linear_model(6, 5, 4, 3, name="others"), {}),
        (linear_model(6, 5, 4, 4), {}),
    ],
    ids=["seed", "dtype", "include", "steps", "report", "low rank", "hypernetwork", "names", "architecture"],
)
def test_what_shows_in_the_reply_counts(tmp_path: Path, model: bytes, fields: dict[str, object]) -> None:
    predictor = FakePredictor()
    for name in ("fake", "other"):
        (tmp_path / f"{name}.safetensors").touch()
    checkpoints = tuple(f"{name}={tmp_path / name}.safetensors" for name in ("fake", "other"))
    with fake_server(tmp_path, predictor, checkpoints=checkpoints) as server, connect(server) as stub:
        receive_file(stub.PredictWeights(predict_request(TINY)))
        receive_file(stub.PredictWeights(predict_request(model, **fields)))
    assert predictor.num_runs == 2


def attention(num_heads: int) -> bytes:
    """A network whose graph's digest does not tell how many heads it has."""
    model = Model({"x": (1, 5, 8)}, opset=23)
    for name in "qkv":
        model.node("MatMul", ["x", model.weight(f"{name}.weight", 8, 8)], name)
    heads = {"q_num_heads": num_heads, "kv_num_heads": num_heads}
    model.linear(model.node("Attention", ["q", "k", "v"], "mixed", **heads), "proj", 8, 8)
    data: bytes = model.proto("proj_out").SerializeToString()
    return data


def residual(epsilon: float) -> bytes:
    """The bundled source's own network with another epsilon, which its graph does not know."""
    proto = onnx.load_model_from_string(Library().load("small_resnet").structure)
    for node in proto.graph.node:
        if node.op_type == "BatchNormalization":
            kept = [item for item in node.attribute if item.name != "epsilon"]
            del node.attribute[:]
            node.attribute.extend([*kept, onnx.helper.make_attribute("epsilon", epsilon)])
    data: bytes = proto.SerializeToString()
    return data


@pytest.mark.parametrize(
    ("make_model", "values", "fields"),
    [
        (attention, (2, 4), {"steps": [ghn_pb2.PostProcessingStep(name="mimetic")]}),
        (residual, (1e-5, 1e-1), {"source": ghn_pb2.SourceOptions(name="small_resnet")}),
    ],
)
def test_what_steps_and_sources_see_counts(
    tmp_path: Path, make_model: Callable[[float], bytes], values: Sequence[float], fields: dict[str, object]
) -> None:
    predictor = FakePredictor()
    with fake_server(tmp_path, predictor) as server, connect(server) as stub:
        for value in (*values, *values):
            receive_file(stub.PredictWeights(predict_request(make_model(value), **fields)))
    assert predictor.num_runs == 2


def test_the_cache_stays_within_its_bytes_and_makes_room(tmp_path: Path) -> None:
    settings = {"memory_bytes": 82 << 20, "cache_bytes": 4 << 20}
    with fake_server(tmp_path, **settings) as server, connect(server) as stub:
        for seed in range(8):
            receive_file(stub.PredictWeights(predict_request(MEGABYTE, seed=seed)))
            assert server.replies.kept_bytes <= 4 << 20
        assert server.replies.kept_bytes > 2 << 20
        wait_until(lambda: server.memory.used == server.replies.kept_bytes)
        receive_file(stub.PredictWeights(predict_request(LARGE)))  # takes all that there is, but a little
        assert server.replies.num_misses == 9


def test_a_failed_prediction_is_not_kept(tmp_path: Path) -> None:
    predictor = FakePredictor(raises(RuntimeError("once")))
    with fake_server(tmp_path, predictor) as server, connect(server) as stub:
        with pytest.raises(grpc.RpcError):
            receive_file(stub.PredictWeights(predict_request(TINY)))
        predictor.before_decoding = lambda on_stage: None
        assert receive_file(stub.PredictWeights(predict_request(TINY)))
        wait_until(lambda: server.memory.used == server.replies.kept_bytes)


def test_a_prediction_goes_on_while_anybody_wants_it(tmp_path: Path) -> None:
    gate = Gate()
    predictor = FakePredictor(gate)
    with fake_server(tmp_path, predictor) as server, connect(server) as stub:
        streams = [stub.PredictWeights(predict_request(TINY)) for _ in range(2)]
        wait_until(lambda: server.replies.num_followed == 1)
        assert gate.entered.wait(PATIENCE_S)
        streams[0].cancel()
        gate.opened.set()
        assert receive_file(streams[1])
        assert predictor.num_runs == 1


def test_a_prediction_that_nobody_wants_ends(tmp_path: Path) -> None:
    gate = Gate()
    with fake_server(tmp_path, FakePredictor(gate)) as server, connect(server) as stub:
        streams = [stub.PredictWeights(predict_request(TINY)) for _ in range(2)]
        wait_until(lambda: server.replies.num_followed == 1)
        assert gate.entered.wait(PATIENCE_S)
        for stream in streams:
            stream.cancel()
        assert gate.ended.wait(PATIENCE_S)
        wait_until(lambda: server.memory.used == 0)
