"""Weights as a byte stream: what is written can be read by others, and what is damaged is never taken for whole."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator

import pytest
import safetensors.torch
from crc32c import crc32c
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from ghn_client.errors import FileError, LimitExceededError, StreamCorruptedError
from ghn_client.wire import ghn_pb2
from ghn_client.wire.codec import (
    DTYPE_BYTES,
    ChunkView,
    Progress,
    _decode_event,
    decode_safetensors_header,
    encode_chunks,
    encode_safetensors_header,
    receive_stream,
    serialize_event,
)
from ghn_client.wire.metadata import PredictionMetadata, TensorInfo, TensorUse, decode_metadata, encode_metadata

Event = ghn_pb2.PredictWeightsResponse

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
Tensors = dict[str, tuple[str, tuple[int, ...]]]
entries = st.dictionaries(
    names,
    st.tuples(st.sampled_from(["F32", "F16", "BF16"]), st.lists(st.integers(0, 4), max_size=3).map(tuple)),
    max_size=6,
)


def build_file(tensors: Tensors, metadata: dict[str, str]) -> tuple[bytes, list[bytes]]:
    """Header and values of a file; no two bytes in a row are the same."""
    sizes = [DTYPE_BYTES[dtype] * math.prod(shape) for dtype, shape in tensors.values()]
    values = [bytes((index * 7 + place) % 251 for place in range(size)) for index, size in enumerate(sizes)]
    return encode_safetensors_header(tensors, metadata), values


def chunk_event(offset: int, data: bytes) -> bytes:
    return Event(chunk=ghn_pb2.Chunk(offset=offset, data=data, crc32c=crc32c(data))).SerializeToString()


def stream_of(file: bytes, chunk_bytes: int = 10) -> list[bytes]:
    """The messages that carry a file."""
    return [
        Event(progress=ghn_pb2.Progress(stage=ghn_pb2.STAGE_QUEUED, queue_position=3)).SerializeToString(),
        Event(header=ghn_pb2.StreamHeader(total_bytes=len(file))).SerializeToString(),
        *encode_chunks([file], chunk_bytes=chunk_bytes),
        Event(trailer=ghn_pb2.StreamTrailer(seconds={"streaming": 1.0})).SerializeToString(),
    ]


HEADER, VALUES = build_file({"a": ("F32", (3, 5)), "b": ("BF16", (7,))}, {"format": "pt"})
FILE = HEADER + b"".join(VALUES)
FIRST_CHUNK = 2


# ---- the file -------------------------------------------------------------------------------------------------------


@given(entries, st.dictionaries(names, names, max_size=3))
def test_the_library_reads_what_we_write(tensors: Tensors, metadata: dict[str, str]) -> None:
    header, values = build_file(tensors, metadata)
    loaded = dict(safetensors.deserialize(header + b"".join(values)))
    assert {name: (item["dtype"], tuple(item["shape"]), bytes(item["data"])) for name, item in loaded.items()} == {
        name: (*entry, data) for (name, entry), data in zip(tensors.items(), values, strict=True)
    }


@given(entries, st.dictionaries(names, names, max_size=3))
def test_the_header_round_trips(tensors: Tensors, metadata: dict[str, str]) -> None:
    header, values = build_file(tensors, metadata)
    placed, found = decode_safetensors_header(header + b"".join(values))
    assert found == metadata
    assert {name: (item.dtype, item.shape) for name, item in placed.items()} == tensors
    assert [item.start for item in placed.values()] == sorted(item.start for item in placed.values())


@given(entries)
def test_the_values_start_at_a_multiple_of_eight(tensors: Tensors) -> None:
    assert len(encode_safetensors_header(tensors, {})) % 8 == 0


def test_we_read_what_the_library_writes() -> None:
    torch = pytest.importorskip("torch")
    file = safetensors.torch.save({"x": torch.ones(2, 3), "y": torch.zeros(4, dtype=torch.bfloat16)}, {"k": "v"})
    placed, metadata = decode_safetensors_header(file)
    assert metadata == {"k": "v"}
    assert {name: item[:2] for name, item in placed.items()} == {"x": ("F32", (2, 3)), "y": ("BF16", (4,))}


@pytest.mark.parametrize(
    "tensors",
    [
        {"__metadata__": ("F32", ())},
        {"a": ("Q4", ())},
    ],
    ids=["reserved", "unknown dtype"],
)
def test_a_header_that_nobody_could_read_is_not_written(tensors: Tensors) -> None:
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
        header = encode_safetensors_header({"a": (dtype, (3,))}, {})
        assert len(dict(safetensors.deserialize(header + bytes(3 * size)))["a"]["data"]) == 3 * size


# ---- chunks ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=40), max_size=6), st.integers(1, 50))
def test_chunks_are_the_stream_cut_into_equal_pieces(pieces: list[bytes], chunk_bytes: int) -> None:
    chunks = [Event.FromString(message).chunk for message in encode_chunks(pieces, chunk_bytes=chunk_bytes)]
    assert b"".join(chunk.data for chunk in chunks) == b"".join(pieces)
    assert [chunk.offset for chunk in chunks] == [index * chunk_bytes for index in range(len(chunks))]
    assert all(len(chunk.data) == chunk_bytes for chunk in chunks[:-1])


def test_pieces_are_read_and_asked_for_when_they_are_needed() -> None:
    made: list[bytearray] = []

    def pieces() -> Iterator[bytearray]:
        for _ in range(3):
            made.append(bytearray(4))
            yield made[-1]

    chunks = encode_chunks(pieces(), chunk_bytes=4)
    next(chunks)
    assert len(made) == 1
    next(chunks)
    assert len(made) == 2


@given(st.lists(st.binary(max_size=300), min_size=1).filter(any), st.integers(1, 400))
def test_chunks_are_what_protobuf_would_write(pieces: list[bytes], chunk_bytes: int) -> None:
    stream = b"".join(pieces)
    starts = range(0, len(stream), chunk_bytes)
    found = list(encode_chunks(pieces, chunk_bytes=chunk_bytes))
    assert found == [chunk_event(start, stream[start : start + chunk_bytes]) for start in starts]


@given(st.integers(0, 2**64 - 1), st.binary(min_size=1, max_size=300))
def test_what_protobuf_writes_is_read_without_a_copy(offset: int, data: bytes) -> None:
    kind, chunk = _decode_event(chunk_event(offset, data))
    assert kind == "chunk"
    assert isinstance(chunk, ChunkView) or crc32c(data) == 0
    assert (chunk.offset, bytes(chunk.data), chunk.crc32c) == (offset, data, crc32c(data))


@given(st.binary(max_size=40) | st.binary(max_size=40).map(lambda tail: b"\x1a" + tail))
def test_any_other_message_is_read_as_protobuf_reads_it(message: bytes) -> None:
    try:
        wanted: Event | None = Event.FromString(message)
    except DecodeError:
        wanted = None
    if wanted is None:
        with pytest.raises(StreamCorruptedError):
            _decode_event(message)
        return
    kind, found = _decode_event(message)
    assert kind == wanted.WhichOneof("event")
    if isinstance(found, ChunkView):
        found = ghn_pb2.Chunk(offset=found.offset, data=bytes(found.data), crc32c=found.crc32c)
    assert kind is None or found == getattr(wanted, kind)


def test_other_events_are_serialized() -> None:
    event = Event(trailer=ghn_pb2.StreamTrailer(report_json="x"))
    assert _decode_event(serialize_event(event)) == ("trailer", event.trailer)
    assert serialize_event(b"x") == b"x"


# ---- receiving ------------------------------------------------------------------------------------------------------


def test_a_whole_stream_is_received() -> None:
    buffer, trailer = receive_stream(stream_of(FILE), max_bytes=len(FILE))
    assert bytes(buffer) == FILE
    assert trailer.seconds == {"streaming": 1.0}
    tensors, metadata = decode_safetensors_header(buffer)
    assert metadata == {"format": "pt"}
    assert [bytes(buffer[item.start : item.stop]) for item in tensors.values()] == VALUES


def test_large_streams_are_writable_memory_too() -> None:
    header, values = build_file({"a": ("F32", (3 << 20,))}, {})
    file = header + values[0]
    buffer, _ = receive_stream(stream_of(file, 1 << 20), max_bytes=1 << 30)
    assert buffer == file
    buffer[-1] = 1


def test_a_chunk_may_be_written_in_another_way() -> None:
    """Fields in another order, as protobuf allows: the generated classes read it."""
    checksum = b"\x1d" + crc32c(FILE).to_bytes(4, "little")
    data = b"\x12" + bytes([len(FILE) & 0x7F | 0x80, len(FILE) >> 7]) + FILE
    size = len(checksum + data)
    message = b"\x1a" + bytes([size & 0x7F | 0x80, size >> 7]) + checksum + data
    _, header, *_, trailer = stream_of(FILE)
    assert bytes(receive_stream([header, message, trailer], max_bytes=1000)[0]) == FILE


def test_progress_is_reported() -> None:
    seen: list[Progress] = []
    receive_stream(stream_of(FILE, 100), max_bytes=1000, on_progress=seen.append)
    assert seen[0] == Progress("queued", queue_position=3)
    assert [item.received_bytes for item in seen[1:]] == [*range(0, len(FILE), 100), len(FILE)]


def test_a_stage_of_a_newer_server_is_passed_over() -> None:
    newer = Event(progress=ghn_pb2.Progress(stage=99)).SerializeToString()  # type: ignore[arg-type]
    assert bytes(receive_stream([newer, *stream_of(FILE)], max_bytes=1000)[0]) == FILE


Damage = Callable[[list[bytes]], object]
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
    "chunk beyond the end": lambda events: events.insert(-1, chunk_event(len(FILE), b"x")),
    "empty chunk": lambda events: events.insert(FIRST_CHUNK, chunk_event(0, b"")),
    "byte flipped": lambda events: events.__setitem__(FIRST_CHUNK + 1, events[FIRST_CHUNK + 1].replace(b"_", b"-")),
    "no message": lambda events: events.insert(FIRST_CHUNK, b"\xff"),
    "progress after header": lambda events: events.insert(FIRST_CHUNK, events[0]),
    "no checksum": lambda events: events.__setitem__(
        FIRST_CHUNK, Event(chunk=ghn_pb2.Chunk(data=FILE[:10])).SerializeToString()
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_stream_is_never_taken_for_whole(damage: Damage) -> None:
    events = stream_of(FILE)
    damage(events)
    with pytest.raises(StreamCorruptedError):
        receive_stream(events, max_bytes=1000)


def test_a_whole_stream_of_nonsense_is_told() -> None:
    buffer, _ = receive_stream(stream_of(b"no safetensors file"), max_bytes=1000)
    with pytest.raises(StreamCorruptedError):
        decode_safetensors_header(buffer)


def test_no_memory_is_taken_for_an_announcement_over_the_limit() -> None:
    events = [Event(header=ghn_pb2.StreamHeader(total_bytes=2**62)).SerializeToString()]
    with pytest.raises(LimitExceededError):
        receive_stream(events, max_bytes=2**40)


def test_errors_of_the_call_pass_through() -> None:
    def events() -> Iterator[bytes]:
        yield stream_of(FILE)[1]
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        receive_stream(events(), max_bytes=1000)


# ---- metadata -------------------------------------------------------------------------------------------------------

METADATA = PredictionMetadata(
    model="m",
    model_digest="d",
    graph_digest="g",
    seed=2**64 - 1,
    dtype="bfloat16",
    tensors=(TensorInfo("ä", "tiled", "x", "y", (1, 0), (TensorUse("node", 1),)), TensorInfo("b", "predicted")),
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
