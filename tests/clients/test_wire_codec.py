"""Weights as a byte stream: what is written can be read by others, and what is damaged is never taken for whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence

import pytest
import safetensors.torch
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from ghn_client.errors import FileError, LimitExceededError, StreamCorruptedError
from ghn_client.wire import ghn_pb2
from ghn_client.wire.codec import (
    DTYPE_BYTES,
    Progress,
    TensorEntry,
    decode_safetensors_header,
    encode_safetensors_header,
    iterate_chunks,
    receive_stream,
)
from ghn_client.wire.framing import DataFrame, OutgoingChunk, decode_event, encode_chunk_frame, encode_event
from ghn_client.wire.metadata import PredictionMetadata, TensorNote, TensorUse, decode_metadata, encode_metadata

Event = ghn_pb2.PredictWeightsResponse

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
entries = st.lists(
    st.builds(
        TensorEntry,
        names,
        st.sampled_from(["F32", "F16", "BF16"]),
        st.lists(st.integers(0, 4), max_size=3).map(tuple),
    ),
    max_size=6,
    unique_by=lambda entry: entry.name,
)


def build_file(tensors: Sequence[TensorEntry], metadata: dict[str, str]) -> tuple[bytes, list[bytes]]:
    """Header and values of a file; no two bytes in a row are the same."""
    values = [bytes((index * 7 + place) % 251 for place in range(item.num_bytes)) for index, item in enumerate(tensors)]
    return encode_safetensors_header(tensors, metadata), values


def stream_of(file: bytes, chunk_bytes: int = 10) -> list[Event | DataFrame]:
    """The events that carry a file."""
    chunks = [
        decode_event(encode_chunk_frame(at, pieces)) for at, pieces in iterate_chunks(file, [], chunk_bytes=chunk_bytes)
    ]
    trailer = ghn_pb2.StreamTrailer(sha256=hashlib.sha256(file).hexdigest())
    header = ghn_pb2.StreamHeader(total_bytes=len(file))
    return [
        Event(progress=ghn_pb2.Progress(stage=ghn_pb2.STAGE_QUEUED, queue_position=3)),
        Event(header=header),
        *chunks,
        Event(trailer=trailer),
    ]


HEADER, VALUES = build_file([TensorEntry("a", "F32", (3, 5)), TensorEntry("b", "BF16", (7,))], {"format": "pt"})
FILE = HEADER + b"".join(VALUES)
FIRST_CHUNK = 2


# ---- the file -------------------------------------------------------------------------------------------------------


@given(entries, st.dictionaries(names, names, max_size=3))
def test_the_library_reads_what_we_write(tensors: list[TensorEntry], metadata: dict[str, str]) -> None:
    header, values = build_file(tensors, metadata)
    loaded = dict(safetensors.deserialize(header + b"".join(values)))
    assert {name: (item["dtype"], tuple(item["shape"]), bytes(item["data"])) for name, item in loaded.items()} == {
        item.name: (item.dtype, item.shape, data) for item, data in zip(tensors, values, strict=True)
    }


@given(entries, st.dictionaries(names, names, max_size=3))
def test_the_header_round_trips(tensors: list[TensorEntry], metadata: dict[str, str]) -> None:
    header, values = build_file(tensors, metadata)
    placed, found = decode_safetensors_header(header + b"".join(values))
    assert found == metadata
    assert {item.entry.name: item.entry for item in placed} == {item.name: item for item in tensors}
    assert [item.start for item in placed] == sorted(item.start for item in placed)


@given(entries)
def test_the_values_start_at_a_multiple_of_eight(tensors: list[TensorEntry]) -> None:
    assert len(encode_safetensors_header(tensors, {})) % 8 == 0


def test_we_read_what_the_library_writes() -> None:
    torch = pytest.importorskip("torch")
    file = safetensors.torch.save({"x": torch.ones(2, 3), "y": torch.zeros(4, dtype=torch.bfloat16)}, {"k": "v"})
    placed, metadata = decode_safetensors_header(file)
    assert metadata == {"k": "v"}
    assert {item.entry for item in placed} == {TensorEntry("x", "F32", (2, 3)), TensorEntry("y", "BF16", (4,))}


@pytest.mark.parametrize(
    "tensors",
    [
        [TensorEntry("a", "F32", ()), TensorEntry("a", "F16", ())],
        [TensorEntry("__metadata__", "F32", ())],
        [TensorEntry("a", "Q4", ())],
    ],
    ids=["repeated", "reserved", "unknown dtype"],
)
def test_a_header_that_nobody_could_read_is_not_written(tensors: list[TensorEntry]) -> None:
    with pytest.raises(ValueError):
        encode_safetensors_header(tensors, {})


def _file(document: object, values: bytes = b"") -> bytes:
    text = json.dumps(document).encode()
    return len(text).to_bytes(8, "little") + text + values


def _tensor(first: int, last: int, **other: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [1], "data_offsets": [first, last], **other}


@pytest.mark.parametrize(
    "file",
    [
        b"",
        b"\x01",
        b"\xff" * 8,
        (10).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"{]",
        _file([]),
        _file({"a": 1}),
        _file({"a": {"dtype": "F32"}}),
        _file({"__metadata__": 1}),
        _file({"a": _tensor(0, 4, dtype="Q4")}, bytes(4)),
        _file({"a": _tensor(0, 4, shape=[-1])}, bytes(4)),
        _file({"a": _tensor(0, 4, shape=["1"])}, bytes(4)),
        _file({"a": _tensor(0, 4, data_offsets=[0])}, bytes(4)),
        _file({"a": _tensor(0, 4, data_offsets=["0", "4"])}, bytes(4)),
        _file({"a": _tensor(0, 8)}, bytes(8)),
        _file({"a": _tensor(4, 8)}, bytes(8)),
        _file({"a": _tensor(0, 4), "b": _tensor(2, 6)}, bytes(6)),
        _file({"a": _tensor(0, 4)}, bytes(5)),
        _file({"a": _tensor(0, 4)}, bytes(3)),
    ],
)
def test_a_damaged_header_is_told(file: bytes) -> None:
    with pytest.raises(StreamCorruptedError):
        decode_safetensors_header(file)


def test_element_sizes_are_those_of_the_library() -> None:
    for dtype, size in DTYPE_BYTES.items():
        header = encode_safetensors_header([TensorEntry("a", dtype, (3,))], {})
        assert len(dict(safetensors.deserialize(header + bytes(3 * size)))["a"]["data"]) == 3 * size


# ---- chunks ---------------------------------------------------------------------------------------------------------


@given(st.binary(min_size=1, max_size=40), st.lists(st.binary(max_size=40), max_size=6), st.integers(1, 50))
def test_chunks_are_the_stream_cut_into_equal_pieces(header: bytes, buffers: list[bytes], chunk_bytes: int) -> None:
    chunks = [(offset, b"".join(pieces)) for offset, pieces in iterate_chunks(header, buffers, chunk_bytes=chunk_bytes)]
    assert b"".join(data for _, data in chunks) == header + b"".join(buffers)
    assert [offset for offset, _ in chunks] == [index * chunk_bytes for index in range(len(chunks))]
    assert all(len(data) == chunk_bytes for _, data in chunks[:-1])


def test_chunks_copy_nothing() -> None:
    memory = bytearray(b"abcdef")
    chunks = iterate_chunks(b"hh", [memory], chunk_bytes=4)
    first = next(chunks)
    memory[:2] = b"XY"
    assert b"".join(first[1]) == b"hhXY"


def test_buffers_are_asked_for_when_they_are_needed() -> None:
    made = []

    def buffers() -> object:
        for index in range(3):
            made.append(index)
            yield bytes(4)

    chunks = iterate_chunks(b"hhhh", buffers(), chunk_bytes=4)  # type: ignore[arg-type]
    next(chunks)
    assert made == []
    next(chunks)
    assert made == [0]


@given(st.integers(0, 2**64 - 1), st.lists(st.binary(max_size=300), min_size=1, max_size=3).filter(any))
def test_a_frame_is_what_protobuf_would_write(offset: int, pieces: list[bytes]) -> None:
    data = b"".join(pieces)
    message = Event(chunk=ghn_pb2.Chunk(offset=offset, data=data)).SerializeToString()
    assert encode_event(OutgoingChunk(offset, pieces)) == message
    frame = decode_event(message)
    assert isinstance(frame, DataFrame)
    assert (frame.offset, bytes(frame.data)) == (offset, data)


@given(st.binary(max_size=40) | st.binary(max_size=40).map(lambda tail: b"\x1a" + tail))
def test_any_other_message_is_read_as_protobuf_reads_it(message: bytes) -> None:
    try:
        wanted: Event | None = Event.FromString(message)
    except DecodeError:
        wanted = None
    if wanted is None:
        with pytest.raises(DecodeError):
            decode_event(message)
        return
    found = decode_event(message)
    if isinstance(found, DataFrame):
        found = Event(chunk=ghn_pb2.Chunk(offset=found.offset, data=bytes(found.data)))
    assert found == wanted


def test_other_events_round_trip() -> None:
    event = Event(trailer=ghn_pb2.StreamTrailer(sha256="x"))
    assert decode_event(encode_event(event)) == event


# ---- receiving ------------------------------------------------------------------------------------------------------


def test_a_whole_stream_is_received() -> None:
    received = receive_stream(stream_of(FILE), max_bytes=len(FILE))
    assert bytes(received.buffer) == FILE
    assert received.metadata == {"format": "pt"}
    assert [bytes(received.buffer[item.start : item.stop]) for item in received.tensors] == VALUES


def test_large_streams_are_writable_memory_too() -> None:
    header, values = build_file([TensorEntry("a", "F32", (3 << 20,))], {})
    received = receive_stream(stream_of(header + values[0], 1 << 20), max_bytes=1 << 30)
    received.buffer[-1] = 1
    assert hashlib.sha256(received.buffer[:-1]).digest() == hashlib.sha256((header + values[0])[:-1]).digest()


def test_chunks_of_the_generated_classes_are_received() -> None:
    events = [
        Event(chunk=ghn_pb2.Chunk(offset=item.offset, data=bytes(item.data))) if isinstance(item, DataFrame) else item
        for item in stream_of(FILE)
    ]
    assert bytes(receive_stream(events, max_bytes=1000).buffer) == FILE


def test_progress_is_reported() -> None:
    seen: list[Progress] = []
    receive_stream(stream_of(FILE, 100), max_bytes=1000, on_progress=seen.append)
    assert seen[0] == Progress("queued", queue_position=3)
    assert [item.received_bytes for item in seen[1:]] == [*range(0, len(FILE), 100), len(FILE)]


def test_a_stage_of_a_newer_server_is_passed_over() -> None:
    events = [Event(progress=ghn_pb2.Progress(stage=99)), *stream_of(FILE)]  # type: ignore[arg-type]
    assert receive_stream(events, max_bytes=1000).trailer.sha256


Damage = Callable[[list[Event | DataFrame]], object]
DAMAGES: dict[str, Damage] = {
    "nothing came": lambda events: events.clear(),
    "no header": lambda events: events.pop(1),
    "two headers": lambda events: events.insert(1, events[1]),
    "no trailer": lambda events: events.pop(),
    "two trailers": lambda events: events.append(events[-1]),
    "chunk after trailer": lambda events: events.append(events[FIRST_CHUNK]),
    "chunk lost": lambda events: events.pop(FIRST_CHUNK + 1),
    "last chunk lost": lambda events: events.pop(-2),
    "chunk repeated": lambda events: events.insert(FIRST_CHUNK, events[FIRST_CHUNK]),
    "chunks swapped": lambda events: events.insert(FIRST_CHUNK, events.pop(FIRST_CHUNK + 1)),
    "chunk beyond the end": lambda events: events.insert(-1, DataFrame(len(FILE), memoryview(b"x"))),
    "empty chunk": lambda events: events.insert(FIRST_CHUNK, DataFrame(0, memoryview(b""))),
    "byte flipped": lambda events: events.__setitem__(FIRST_CHUNK, DataFrame(0, memoryview(b"x" * 10))),
    "progress after header": lambda events: events.insert(FIRST_CHUNK, events[0]),
    "other sha256": lambda events: events.__setitem__(-1, Event(trailer=ghn_pb2.StreamTrailer(sha256="0" * 64))),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_stream_is_never_taken_for_whole(damage: Damage) -> None:
    events = stream_of(FILE)
    damage(events)
    with pytest.raises(StreamCorruptedError):
        receive_stream(events, max_bytes=1000)


def test_a_whole_stream_of_nonsense_is_told() -> None:
    with pytest.raises(StreamCorruptedError):
        receive_stream(stream_of(b"no safetensors file"), max_bytes=1000)


def test_no_memory_is_taken_for_an_announcement_over_the_limit() -> None:
    events = [Event(header=ghn_pb2.StreamHeader(total_bytes=2**62))]
    with pytest.raises(LimitExceededError):
        receive_stream(events, max_bytes=2**40)


def test_errors_of_the_call_pass_through() -> None:
    def events() -> object:
        yield stream_of(FILE)[1]
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        receive_stream(events(), max_bytes=1000)  # type: ignore[arg-type]


# ---- metadata -------------------------------------------------------------------------------------------------------

METADATA = PredictionMetadata(
    model="m",
    model_digest="d",
    graph_digest="g",
    seed=2**64 - 1,
    dtype="bfloat16",
    tensors=(TensorNote("ä", "tiled", "x", "y", (1, 0), (TensorUse("node", 1),)), TensorNote("b", "predicted")),
    warnings=("w",),
    steps=({"name": "noise", "options": {"beta": 1e-5}},),
    low_rank={"method": "spectral"},
)


def test_metadata_round_trips() -> None:
    assert decode_metadata(encode_metadata(METADATA)) == METADATA


def test_metadata_of_a_newer_version_is_read() -> None:
    assert decode_metadata({**encode_metadata(METADATA), "ghn.future": "1"}) == METADATA


@pytest.mark.parametrize("key", ["ghn.format", "ghn.seed", "ghn.tensors"])
def test_metadata_without_a_key_is_no_prediction(key: str) -> None:
    encoded = encode_metadata(METADATA)
    del encoded[key]
    with pytest.raises(FileError):
        decode_metadata(encoded)


@pytest.mark.parametrize("text", ["{", "1", '[{"odd": 1}]'])
def test_damaged_metadata_is_told(text: str) -> None:
    with pytest.raises(FileError):
        decode_metadata({**encode_metadata(METADATA), "ghn.tensors": text})
