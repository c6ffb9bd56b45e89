"""What the client does with a server that goes away or lies in the middle of a stream."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from crc32c import crc32c
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ghn_client import GHNClient
from ghn_client.errors import (
    AuthenticationError,
    FileError,
    GhnClientError,
    ServerError,
    ServerUnavailableError,
    StreamCorruptedError,
    UnsupportedOptionError,
)
from ghn_client.wire import ghn_pb2, ghn_pb2_grpc
from ghn_client.wire.codec import encode_safetensors_header, open_prediction_stream
from ghn_client.wire.metadata import PredictionMetadata, TensorInfo, encode_metadata
from tests.server.fake_predictor import fake_server, predict_request
from tests.server.small_models import TINY, linear_model

Events = Iterator[ghn_pb2.PredictWeightsResponse]
Script = Callable[[grpc.ServicerContext], Events]
FIVE_CHUNKS = linear_model(1024, 1024)
METADATA = PredictionMetadata("fake", "ab", "cd", 0, "float32", (TensorInfo("w", "predicted"),))


def file_bytes(metadata: dict[str, str] | None = None) -> bytes:
    encoded = encode_metadata(METADATA) if metadata is None else metadata
    return encode_safetensors_header({"w": ("F32", (4,))}, encoded) + b"\0" * 16


def chunk_event(offset: int, data: bytes) -> ghn_pb2.PredictWeightsResponse:
    return ghn_pb2.PredictWeightsResponse(chunk=ghn_pb2.Chunk(offset=offset, data=data, crc32c=crc32c(data)))


def events(data: bytes) -> Events:
    yield ghn_pb2.PredictWeightsResponse(header=ghn_pb2.StreamHeader(total_bytes=len(data)))
    half = len(data) // 2
    yield chunk_event(0, data[:half])
    yield chunk_event(half, data[half:])
    yield ghn_pb2.PredictWeightsResponse(trailer=ghn_pb2.StreamTrailer())


class ScriptedServicer(ghn_pb2_grpc.GhnServiceServicer):
    """Answers the first call with the first script, and so on; the last one again and again."""

    def __init__(self, scripts: list[Script]) -> None:
        self.scripts = scripts
        self.times: list[float] = []

    def PredictWeights(self, request: ghn_pb2.PredictWeightsRequest, context: grpc.ServicerContext) -> Events:  # noqa: N802
        self.times.append(time.monotonic())
        return self.scripts[min(len(self.times), len(self.scripts)) - 1](context)


@contextmanager
def scripted(*scripts: Script, **options: int) -> Iterator[tuple[GHNClient, ScriptedServicer]]:
    servicer = ScriptedServicer(list(scripts))
    server = grpc.server(ThreadPoolExecutor(4))
    ghn_pb2_grpc.add_GhnServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with GHNClient(f"127.0.0.1:{port}", **options) as client:
            yield client, servicer
    finally:
        server.stop(0)


def whole(context: grpc.ServicerContext) -> Events:
    return events(file_bytes())


def abort(code: grpc.StatusCode, *, after: int = 0, pushback_ms: int | str | None = None) -> Script:
    """Sends some events, then fails."""

    def script(context: grpc.ServicerContext) -> Events:
        stream = events(file_bytes())
        for _ in range(after):
            yield next(stream)
        if pushback_ms is not None:
            context.set_trailing_metadata((("grpc-retry-pushback-ms", str(pushback_ms)),))
        context.abort(code, "as the test wants")

    return script


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_a_server_that_goes_away_during_the_stream_is_asked_again(after: int) -> None:
    with scripted(abort(grpc.StatusCode.UNAVAILABLE, after=after), whole) as (client, servicer):
        assert client.predict(TINY)["w"].shape == (4,)
        assert len(servicer.times) == 2


def test_attempts_are_counted() -> None:
    with scripted(abort(grpc.StatusCode.UNAVAILABLE), max_attempts=3) as (client, servicer):
        with pytest.raises(ServerUnavailableError):
            client.predict(TINY)
        assert len(servicer.times) == 3


def test_the_pushback_of_the_server_is_waited_for() -> None:
    with scripted(abort(grpc.StatusCode.UNAVAILABLE, pushback_ms=700), whole) as (client, servicer):
        client.predict(TINY)
        first, second = servicer.times
        assert second - first >= 0.7


@pytest.mark.parametrize("pushback_ms", [-1, "soon"])
def test_a_pushback_may_forbid_another_attempt(pushback_ms: int | str) -> None:
    with scripted(abort(grpc.StatusCode.UNAVAILABLE, pushback_ms=pushback_ms)) as (client, servicer):
        with pytest.raises(ServerUnavailableError):
            client.predict(TINY)
        assert len(servicer.times) == 1


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (grpc.StatusCode.INTERNAL, ServerError),
        (grpc.StatusCode.UNKNOWN, ServerError),
        (grpc.StatusCode.UNIMPLEMENTED, UnsupportedOptionError),
        (grpc.StatusCode.UNAUTHENTICATED, AuthenticationError),
        (grpc.StatusCode.PERMISSION_DENIED, AuthenticationError),
        (grpc.StatusCode.CANCELLED, ServerError),
        (grpc.StatusCode.DATA_LOSS, StreamCorruptedError),
    ],
)
def test_other_codes_end_the_call_at_once(code: grpc.StatusCode, error: type[GhnClientError]) -> None:
    with scripted(abort(code)) as (client, servicer):
        with pytest.raises(error):
            client.predict(TINY)
        assert len(servicer.times) == 1


def changed(context: grpc.ServicerContext) -> Events:
    header, first, second, trailer = events(file_bytes())
    second.chunk.data = second.chunk.data[:-1] + b"!"
    return iter([header, first, second, trailer])


def without_trailer(context: grpc.ServicerContext) -> Events:
    return iter(list(events(file_bytes()))[:-1])


def repeated(context: grpc.ServicerContext) -> Events:
    first, second, *rest = events(file_bytes())
    return iter([first, second, second, *rest])


@pytest.mark.parametrize("script", [changed, without_trailer, repeated])
def test_a_stream_that_lies_is_refused(script: Script) -> None:
    with scripted(script) as (client, _), pytest.raises(StreamCorruptedError) as caught:
        client.predict(TINY)
    assert caught.value.request_id


# ---- a proxy that damages chunks ------------------------------------------------------------------------------------


class CorruptingProxy(grpc.GenericRpcHandler):
    """Answers with what a real server sent, or with what a test made of it.

    Attributes:
        received: The server's messages.
        chunks: Places of the chunks among them.
        sent: What is sent on.
    """

    def __init__(self, received: list[bytes]) -> None:
        self.received = received
        kinds = [ghn_pb2.PredictWeightsResponse.FromString(message).WhichOneof("event") for message in received]
        self.chunks = [place for place, kind in enumerate(kinds) if kind == "chunk"]
        self.sent = received

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return grpc.unary_stream_rpc_method_handler(lambda request, context: iter(self.sent))


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[CorruptingProxy, GHNClient]]:
    with fake_server(tmp_path_factory.mktemp("real")) as real, grpc.insecure_channel(real.address) as channel:
        handler = CorruptingProxy(list(open_prediction_stream(channel)(predict_request(FIVE_CHUNKS))))
    server = grpc.server(ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with GHNClient(f"127.0.0.1:{port}") as client:
        yield handler, client
    server.stop(0)


def flip(data: st.DataObject, messages: list[bytes], place: int, other: int) -> None:
    damaged = bytearray(messages[place])
    at = data.draw(st.integers(0, 8 * len(damaged) - 1) | st.integers(0, 100))  # the first bytes are the chunk's head
    damaged[at // 8] ^= 1 << at % 8
    messages[place] = bytes(damaged)


def truncate(data: st.DataObject, messages: list[bytes], place: int, other: int) -> None:
    messages[place] = messages[place][: data.draw(st.integers(0, len(messages[place]) - 1))]


def shorten(data: st.DataObject, messages: list[bytes], place: int, other: int) -> None:
    """The chunk is a well-formed message, and its bytes are fewer."""
    event = ghn_pb2.PredictWeightsResponse.FromString(messages[place])
    event.chunk.data = event.chunk.data[: data.draw(st.integers(0, len(event.chunk.data) - 1))]
    messages[place] = event.SerializeToString()


def lose(data: st.DataObject, messages: list[bytes], place: int, other: int) -> None:
    del messages[place]


def duplicate(data: st.DataObject, messages: list[bytes], place: int, other: int) -> None:
    messages.insert(other, messages[place])


def swap(data: st.DataObject, messages: list[bytes], place: int, other: int) -> None:
    messages[place], messages[other] = messages[other], messages[place]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("damage", [flip, truncate, shorten, lose, duplicate, swap])
def test_a_damaged_chunk_is_never_taken_for_weights(
    proxy: tuple[CorruptingProxy, GHNClient], damage: Callable[..., None], data: st.DataObject
) -> None:
    handler, client = proxy
    place = data.draw(st.sampled_from(handler.chunks))
    other = data.draw(st.sampled_from([item for item in handler.chunks if item != place]))
    handler.sent = list(handler.received)
    damage(data, handler.sent, place, other)
    with pytest.raises(StreamCorruptedError):
        client.predict(TINY)


def test_an_undamaged_stream_passes_the_proxy(proxy: tuple[CorruptingProxy, GHNClient]) -> None:
    handler, client = proxy
    handler.sent = handler.received
    assert len(handler.chunks) == 5
    assert client.predict(TINY)["layers.0.weight"].shape == (1024, 1024)


def test_a_file_of_another_kind_is_refused() -> None:
    with scripted(lambda context: events(file_bytes({}))) as (client, _), pytest.raises(FileError):
        client.predict(TINY)


def test_an_interruption_ends_the_call_on_the_server() -> None:
    ended: list[bool] = []

    def endless(context: grpc.ServicerContext) -> Events:
        context.add_callback(lambda: ended.append(True))
        while context.is_active():
            yield ghn_pb2.PredictWeightsResponse(progress=ghn_pb2.Progress(stage=ghn_pb2.STAGE_QUEUED))
            time.sleep(0.01)

    def interrupt(progress: object) -> None:
        raise KeyboardInterrupt

    with scripted(endless) as (client, _):
        with pytest.raises(KeyboardInterrupt):
            client.predict(TINY, on_progress=interrupt)
        deadline = time.monotonic() + 5
        while not ended and time.monotonic() < deadline:
            time.sleep(0.01)
    assert ended


def test_nothing_is_written_if_the_stream_breaks(tmp_path: Path) -> None:
    with scripted(changed) as (client, _), pytest.raises(StreamCorruptedError):
        client.predict(TINY).save(tmp_path / "weights.safetensors")
    assert not list(tmp_path.iterdir())
