"""Weights as a stream of bytes: the safetensors header, the chunks that carry the file, and the side that checks them.

The stream of a prediction is one safetensors file (https://huggingface.co/docs/safetensors). The library writes whole
files only, so the header writer is ours; the tests check it against the library.

Chunks are written and read by hand (https://protobuf.dev/programming-guides/encoding), which saves copies that cost a
quarter of the stream's speed (docs/performance.md). The bytes are those that the generated classes write, so any
client reads them, and whatever is written in another way is left to the generated classes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from crc32c import crc32c
from google.protobuf.message import DecodeError

from ghn_client.errors import LimitExceededError, StreamCorruptedError
from ghn_client.huge_pages import allocate_buffer
from ghn_client.wire import ghn_pb2

if TYPE_CHECKING:
    import grpc

SERVICE = "ghn.v1.GhnService"
CHUNK_BYTES = 1 << 20
"""Bytes of a chunk; measured as the fastest size that every stock gRPC client accepts."""

MAX_HEADER_BYTES = 100_000_000
"""Bytes of a JSON header beyond which the safetensors library refuses a file."""


DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}
"""Bytes per element, by the safetensors name of the element type."""

_UNSPECIFIED = "UNSPECIFIED"
"""End of the name of the value 0 in every enum."""
_CHUNK, _OFFSET, _DATA, _CRC32C = 0x1A, 0x08, 0x12, 0x1D
"""Field number and wire type: of ``PredictWeightsResponse.chunk``, and of the fields of ``Chunk``."""

Buffer = bytes | bytearray | memoryview
"""Contiguous bytes."""


class PlacedTensor(NamedTuple):
    """A tensor of a file: element type by safetensors name, shape, and its values as bytes ``start`` to ``stop``."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class ChunkView(NamedTuple):
    """A chunk as it arrived; the fields are those of ``Chunk``, and ``data`` is a view into the message."""

    offset: int
    data: memoryview
    crc32c: int


def encode_enum(kind: Any, name: str) -> Any:
    """The value of an enum of the protocol by the name that users know it by; "" leaves the choice to the server.

    ``encode_enum(ghn_pb2.LowRankMethod, "spectral")`` is ``LOW_RANK_METHOD_SPECTRAL``.

    Raises:
        ValueError: There is none of this name.
    """
    return kind.Value(_enum_prefix(kind) + (name.upper() or _UNSPECIFIED))


def decode_enum(kind: Any, number: int) -> str:
    """The name that users know a value of an enum by; text of its number where it is none that is known here."""
    if number not in kind.values():
        return str(number)
    return str(kind.Name(number)).removeprefix(_enum_prefix(kind)).lower() if number else ""


def enum_names(kind: Any) -> tuple[str, ...]:
    """All names that users know of an enum."""
    return tuple(decode_enum(kind, number) for number in kind.values() if number)


def _enum_prefix(kind: Any) -> str:
    return str(kind.Name(0)).removesuffix(_UNSPECIFIED)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a prediction is.

    Attributes:
        stage: ``queued``, ``encoding``, ``transferring``, ``predicting``, ``post_processing`` or ``streaming``.
        queue_position: Requests ahead of this one, while it is queued.
        received_bytes: Bytes of the file that have arrived.
        total_bytes: Bytes of the whole file; 0 before it is known.
    """

    stage: str
    queue_position: int = 0
    received_bytes: int = 0
    total_bytes: int = 0


def encode_safetensors_header(tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a safetensors file, length and JSON header; the values follow in the order of ``tensors``.

    Args:
        tensors: Element type by safetensors name (``"F32"``) and shape, by name of the tensor.
        metadata: Text by key, kept in this order.

    Raises:
        ValueError: A name is reserved, an element type is unknown, or the header is too large.
    """
    document: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        if name == "__metadata__":
            raise ValueError(f"tensor name {name!r} is reserved")
        if dtype not in DTYPE_BYTES:
            raise ValueError(f"tensor {name!r}: unknown dtype {dtype!r}; known are {', '.join(DTYPE_BYTES)}")
        end = offset + math.prod(shape) * DTYPE_BYTES[dtype]
        document[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"the header has {len(text)} bytes; safetensors files allow {MAX_HEADER_BYTES}")
    return len(text).to_bytes(8, "little") + text


def decode_safetensors_header(buffer: Buffer) -> tuple[dict[str, PlacedTensor], dict[str, str]]:
    """What ``encode_safetensors_header`` wrote, from a whole file: tensors by name in file order, and the metadata.

    Raises:
        StreamCorruptedError: The header is malformed, or its tensors do not cover the file exactly.
    """
    size = int.from_bytes(buffer[:8], "little")
    if len(buffer) < 8 or size > min(MAX_HEADER_BYTES, len(buffer) - 8):
        raise StreamCorruptedError(f"a safetensors header of {size} bytes does not fit a file of {len(buffer)} bytes")
    start = position = 8 + size
    tensors: dict[str, PlacedTensor] = {}
    try:
        document = json.loads(bytes(buffer[8:start]))
        metadata = {str(key): str(value) for key, value in document.pop("__metadata__", {}).items()}
        for name, item in sorted(document.items(), key=lambda pair: pair[1]["data_offsets"]):
            dtype, shape, (first, last) = item["dtype"], item["shape"], item["data_offsets"]
            if not isinstance(shape, list) or not all(isinstance(size, int) and size >= 0 for size in shape):
                raise ValueError(f"tensor {name!r} has shape {shape!r}")
            num_bytes = math.prod(shape) * DTYPE_BYTES[dtype]
            if (start + first, last - first) != (position, num_bytes):
                raise ValueError(f"tensor {name!r} at {first} to {last}: expected {num_bytes} from {position - start}")
            tensors[name] = PlacedTensor(dtype, tuple(shape), position, position + num_bytes)
            position += num_bytes
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StreamCorruptedError(f"the safetensors header is malformed: {error!r}") from error
    if position != len(buffer):
        raise StreamCorruptedError(f"the tensors end at byte {position} of a file of {len(buffer)} bytes")
    return tensors, metadata


def encode_chunks(pieces: Iterable[Buffer], *, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
    """Cuts ``pieces``, one behind the other, into chunks as serialised ``PredictWeightsResponse``; copies them once.

    Args:
        pieces: The bytes of the stream; taken one at a time, so each may be made when it is asked for.
        chunk_bytes: Bytes of every chunk but the last.
    """
    offset, num_bytes, checksum = 0, 0, 0
    held: list[memoryview] = []
    for piece in pieces:
        view = memoryview(piece).cast("B")
        while len(view):
            part, view = view[: chunk_bytes - num_bytes], view[chunk_bytes - num_bytes :]
            held.append(part)
            num_bytes += len(part)
            checksum = crc32c(part, checksum)
            if num_bytes == chunk_bytes:
                yield _encode_chunk(offset, held, num_bytes, checksum)
                offset, num_bytes, checksum, held = offset + num_bytes, 0, 0, []
    if held:
        yield _encode_chunk(offset, held, num_bytes, checksum)


def serialize_event(event: ghn_pb2.PredictWeightsResponse | bytes) -> bytes:
    """What gRPC sends for an event; chunks are serialised already."""
    return event if isinstance(event, bytes) else event.SerializeToString()


def _encode_chunk(offset: int, pieces: Sequence[memoryview], num_bytes: int, checksum: int) -> bytes:
    """A serialised ``PredictWeightsResponse`` with a chunk; as in every proto3 message, zeros are left out."""
    head = (bytes([_OFFSET]) + _encode_varint(offset) if offset else b"") + bytes([_DATA]) + _encode_varint(num_bytes)
    tail = bytes([_CRC32C]) + checksum.to_bytes(4, "little") if checksum else b""
    return b"".join((bytes([_CHUNK]), _encode_varint(len(head) + num_bytes + len(tail)), head, *pieces, tail))


def _encode_varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def open_prediction_stream(
    channel: grpc.Channel,
) -> grpc.UnaryStreamMultiCallable[ghn_pb2.PredictWeightsRequest, bytes]:
    """PredictWeights as a callable of ``channel``, like the generated stub's, whose events stay serialised."""
    return channel.unary_stream(
        f"/{SERVICE}/PredictWeights", request_serializer=ghn_pb2.PredictWeightsRequest.SerializeToString
    )


def _decode_event(message: bytes) -> tuple[str | None, Any]:
    """Kind and content of a serialised event; a chunk as ``encode_chunks`` writes it becomes a view of the message."""
    try:
        length, position = _decode_varint(message, 1)
        if message[0] == _CHUNK and position + length == len(message):
            offset = 0
            if message[position] == _OFFSET:
                offset, position = _decode_varint(message, position + 1)
            num_bytes, start = _decode_varint(message, position + 1)
            stop = start + num_bytes
            is_whole = stop + 5 == len(message) and message[stop] == _CRC32C
            if is_whole and message[position] == _DATA and offset < 1 << 64:
                checksum = int.from_bytes(message[stop + 1 :], "little")
                return "chunk", ChunkView(offset, memoryview(message)[start:stop], checksum)
    except IndexError:
        pass  # the message is shorter than any such chunk
    try:
        event = ghn_pb2.PredictWeightsResponse.FromString(message)
    except DecodeError as error:
        raise StreamCorruptedError(f"{len(message)} bytes of the stream are no event: {error}") from error
    kind = event.WhichOneof("event")
    return kind, getattr(event, kind) if kind else None


def _decode_varint(message: bytes, position: int) -> tuple[int, int]:
    """The number at ``position``, and the position behind it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
    return value, position


def receive_stream(
    messages: Iterable[bytes],
    *,
    max_bytes: int,
    on_progress: Callable[[Progress], None] | None = None,
) -> tuple[memoryview, ghn_pb2.StreamTrailer]:
    """Receives the events of one prediction, progress*, header, chunk*, trailer, and checks everything about them.

    Args:
        messages: Serialised ``PredictWeightsResponse``, as ``open_prediction_stream`` gives them; what this iterator
            raises passes through.
        max_bytes: The largest file to accept; no memory is taken before the announced size is checked against it.
        on_progress: Called for every event.

    Returns:
        The file, in writable memory, and the trailer.

    Raises:
        StreamCorruptedError: The stream breaks the protocol, or ends before its trailer.
        LimitExceededError: The server announces more than ``max_bytes``.
    """
    report = on_progress or (lambda progress: None)
    buffer = memoryview(b"")
    has_header, received = False, 0
    trailer: ghn_pb2.StreamTrailer | None = None
    for message in messages:
        kind, event = _decode_event(message)
        if trailer is not None:
            raise StreamCorruptedError("the stream goes on after its trailer")
        if has_header != (kind in ("chunk", "trailer")) and kind is not None:
            raise StreamCorruptedError(f"a {kind} came {'after' if has_header else 'before'} the header")
        if kind == "progress" and event.stage in ghn_pb2.Stage.values():  # stages of a newer server are passed over
            report(Progress(decode_enum(ghn_pb2.Stage, event.stage), queue_position=event.queue_position))
        elif kind == "header":
            if event.total_bytes > max_bytes:
                raise LimitExceededError(
                    f"the server announces {event.total_bytes} bytes of weights, and this client accepts {max_bytes}; "
                    "raise max_bytes if that is wanted"
                )
            buffer = allocate_buffer(event.total_bytes)
            has_header = True
            report(Progress("streaming", total_bytes=len(buffer)))
        elif kind == "chunk":
            end = received + len(event.data)
            if event.offset != received:
                raise StreamCorruptedError(
                    f"a chunk has offset {event.offset}, expected {received}: bytes lost or repeated"
                )
            if not event.data or end > len(buffer):
                raise StreamCorruptedError(f"a chunk ends at byte {end} of an announced {len(buffer)}")
            if crc32c(event.data) != event.crc32c:
                raise StreamCorruptedError(f"bytes {received} to {end} were changed on their way: wrong CRC-32C")
            buffer[received:end] = event.data
            received = end
            report(Progress("streaming", received_bytes=received, total_bytes=len(buffer)))
        elif kind == "trailer":
            if received != len(buffer):
                raise StreamCorruptedError(f"the trailer came after {received} of {len(buffer)} announced bytes")
            trailer = event
    if trailer is None:
        raise StreamCorruptedError(f"the stream ended without its trailer, after {received} bytes")
    return buffer, trailer
