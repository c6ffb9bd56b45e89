"""Weights as a byte stream: the safetensors header, the chunks that carry it, and the receiving side that checks it.

The stream of a prediction is one safetensors file (https://huggingface.co/docs/safetensors): 8 bytes with the length
of the JSON header as a little-endian integer, the header padded with spaces to a multiple of 8 bytes, then the tensors
in the order of the header without gaps. The library writes whole files only, so the header writer is ours; the tests
check it against the library.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ghn_client.errors import LimitExceededError, StreamCorruptedError
from ghn_client.wire import ghn_pb2
from ghn_client.wire.buffers import BackgroundSha256, allocate_buffer
from ghn_client.wire.framing import DataFrame

CHUNK_BYTES = 1 << 20
"""Bytes of a chunk; measured as the fastest size that every stock gRPC client accepts."""

MAX_HEADER_BYTES = 100_000_000
"""Bytes of a JSON header beyond which the safetensors library refuses a file."""

DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}
"""Bytes per element, by the safetensors name of the element type."""

Buffer = bytes | bytearray | memoryview
"""Contiguous bytes."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file: its name, its element type by safetensors name (``"F32"``), and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor's values."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class PlacedTensor:
    """A tensor of a received file, and where its values are: bytes ``start`` to ``stop`` of the whole file."""

    entry: TensorEntry
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a prediction is.

    Attributes:
        stage: ``queued``, ``encoding``, ``predicting``, ``post_processing`` or ``streaming``.
        queue_position: Requests ahead of this one, while it is queued.
        received_bytes: Bytes of the file that have arrived.
        total_bytes: Bytes of the whole file; 0 before it is known.
    """

    stage: str
    queue_position: int = 0
    received_bytes: int = 0
    total_bytes: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class ReceivedPrediction:
    """A whole, checked reply.

    Attributes:
        buffer: The safetensors file, in writable memory.
        tensors: What is in it, in file order.
        metadata: The file's ``__metadata__``.
        header: The stream's header.
        trailer: The stream's trailer.
    """

    buffer: memoryview
    tensors: tuple[PlacedTensor, ...]
    metadata: Mapping[str, str]
    header: ghn_pb2.StreamHeader
    trailer: ghn_pb2.StreamTrailer


def encode_safetensors_header(entries: Sequence[TensorEntry], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a safetensors file: length and JSON header; the values follow in the order of ``entries``.

    Args:
        entries: The tensors, in file order.
        metadata: Text by key, kept in this order.

    Raises:
        ValueError: A name is repeated or reserved, an element type is unknown, or the header is too large.
    """
    document: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for entry in entries:
        if entry.name in document or entry.name == "__metadata__":
            raise ValueError(f"tensor name {entry.name!r} is repeated or reserved")
        if entry.dtype not in DTYPE_BYTES:
            raise ValueError(
                f"tensor {entry.name!r}: unknown dtype {entry.dtype!r}; known are {', '.join(DTYPE_BYTES)}"
            )
        end = offset + entry.num_bytes
        document[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"the header has {len(text)} bytes; safetensors files allow {MAX_HEADER_BYTES}")
    return len(text).to_bytes(8, "little") + text


def decode_safetensors_header(buffer: Buffer) -> tuple[tuple[PlacedTensor, ...], dict[str, str]]:
    """What ``encode_safetensors_header`` wrote, from a whole file.

    Args:
        buffer: The whole file.

    Returns:
        The tensors in file order, and the metadata.

    Raises:
        StreamCorruptedError: The header is malformed, or its tensors do not cover the file exactly.
    """
    size = int.from_bytes(buffer[:8], "little")
    if len(buffer) < 8 or size > min(MAX_HEADER_BYTES, len(buffer) - 8):
        raise StreamCorruptedError(f"a safetensors header of {size} bytes does not fit a file of {len(buffer)} bytes")
    try:
        document = json.loads(bytes(buffer[8 : 8 + size]))
        metadata = {str(key): str(value) for key, value in document.pop("__metadata__", {}).items()}
        items = [(_entry_from_json(name, item), *_offsets_from_json(name, item)) for name, item in document.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StreamCorruptedError(f"the safetensors header is malformed: {error!r}") from error
    return _place_tensors(items, start=8 + size, stop=len(buffer)), metadata


def _entry_from_json(name: str, item: Mapping[str, object]) -> TensorEntry:
    shape = item["shape"]
    if not isinstance(shape, list) or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ValueError(f"tensor {name!r} has shape {shape!r}")
    if item["dtype"] not in DTYPE_BYTES:
        raise ValueError(f"tensor {name!r} has dtype {item['dtype']!r}")
    return TensorEntry(name, str(item["dtype"]), tuple(shape))


def _offsets_from_json(name: str, item: Mapping[str, object]) -> tuple[int, int]:
    match item["data_offsets"]:
        case [int(first), int(last)]:
            return first, last
    raise ValueError(f"tensor {name!r} has data_offsets {item['data_offsets']!r}")


def _place_tensors(items: Iterable[tuple[TensorEntry, int, int]], *, start: int, stop: int) -> tuple[PlacedTensor, ...]:
    """Checks that the tensors follow each other without gaps from ``start`` to ``stop``."""
    placed = []
    position = start
    for entry, first, last in sorted(items, key=lambda item: item[1:]):
        if start + first != position or last - first != entry.num_bytes:
            raise StreamCorruptedError(
                f"tensor {entry.name!r} at {first} to {last}: expected {entry.num_bytes} bytes from {position - start}"
            )
        position = start + last
        placed.append(PlacedTensor(entry, start + first, position))
    if position != stop:
        raise StreamCorruptedError(f"the tensors end at byte {position} of a file of {stop} bytes")
    return tuple(placed)


def iterate_chunks(
    header: bytes, buffers: Iterable[Buffer], *, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[tuple[int, list[memoryview]]]:
    """Cuts ``header`` and ``buffers`` into chunks of ``chunk_bytes``, across tensor boundaries, without a copy.

    Args:
        header: First bytes of the stream.
        buffers: Values of each tensor, in order; taken one at a time, so each may be made when it is asked for.
        chunk_bytes: Bytes of every chunk but the last.

    Yields:
        The offset of the chunk, and the pieces that form it; ``b"".join(pieces)`` is the chunk.
    """
    offset, filled = 0, 0
    pieces: list[memoryview] = []
    for buffer in _header_then(header, buffers):
        view = memoryview(buffer).cast("B")
        while len(view):
            piece, view = view[: chunk_bytes - filled], view[chunk_bytes - filled :]
            pieces.append(piece)
            filled += len(piece)
            if filled == chunk_bytes:
                yield offset, pieces
                offset, filled, pieces = offset + chunk_bytes, 0, []
    if pieces:
        yield offset, pieces


def _header_then(header: bytes, buffers: Iterable[Buffer]) -> Iterator[Buffer]:
    yield header
    yield from buffers


def receive_stream(
    events: Iterable[ghn_pb2.PredictWeightsResponse | DataFrame],
    *,
    max_bytes: int,
    on_progress: Callable[[Progress], None] | None = None,
) -> ReceivedPrediction:
    """Reads a whole reply into one preallocated buffer and checks order, offsets, sizes, and the sha256.

    Args:
        events: The reply of PredictWeights; what the iterator raises passes through.
        max_bytes: The largest file to accept; no memory is taken before the announced size is checked against it.
        on_progress: Called for every event.

    Raises:
        StreamCorruptedError: The stream breaks the protocol, or ends before its trailer.
        LimitExceededError: The server announces more than ``max_bytes``.
    """
    with BackgroundSha256() as sha256:
        receiver = _Receiver(max_bytes, on_progress or (lambda progress: None), sha256)
        for event in events:
            receiver.take(event)
        return receiver.finish()


class _Receiver:
    """The state of one reply while it arrives: progress*, header, chunk*, trailer."""

    def __init__(self, max_bytes: int, on_progress: Callable[[Progress], None], sha256: BackgroundSha256) -> None:
        self.max_bytes = max_bytes
        self.on_progress = on_progress
        self.header: ghn_pb2.StreamHeader | None = None
        self.trailer: ghn_pb2.StreamTrailer | None = None
        self.buffer = memoryview(b"")
        self.received = 0
        self.sha256 = sha256

    def take(self, event: ghn_pb2.PredictWeightsResponse | DataFrame) -> None:
        """Takes the next event."""
        if self.trailer is not None:
            raise StreamCorruptedError("the stream goes on after its trailer")
        if isinstance(event, DataFrame):
            self.take_chunk(event.offset, event.data)
            return
        kind = event.WhichOneof("event")
        if kind == "progress":
            self.take_progress(event.progress)
        elif kind == "header":
            self.take_header(event.header)
        elif kind == "chunk":
            self.take_chunk(event.chunk.offset, event.chunk.data)
        elif kind == "trailer":
            self.take_trailer(event.trailer)

    def take_progress(self, progress: ghn_pb2.Progress) -> None:
        """A sign of life, allowed before the header only; stages of a newer server are passed over."""
        if self.header is not None:
            raise StreamCorruptedError("a progress event came after the header")
        if progress.stage in ghn_pb2.Stage.values():
            stage = ghn_pb2.Stage.Name(progress.stage).removeprefix("STAGE_").lower()
            self.on_progress(Progress(stage, queue_position=progress.queue_position))

    def take_header(self, header: ghn_pb2.StreamHeader) -> None:
        """Checks the announced size, and only then takes memory."""
        if self.header is not None:
            raise StreamCorruptedError("the stream has two headers")
        if header.total_bytes > self.max_bytes:
            raise LimitExceededError(
                f"the server announces {header.total_bytes} bytes of weights, and this client accepts "
                f"{self.max_bytes}; raise max_bytes if that is wanted"
            )
        self.header = header
        self.buffer = allocate_buffer(header.total_bytes)
        self.report_bytes()

    def take_chunk(self, offset: int, data: Buffer) -> None:
        """Copies one chunk to its place."""
        if self.header is None:
            raise StreamCorruptedError("a chunk came before the header")
        if offset != self.received:
            raise StreamCorruptedError(f"a chunk has offset {offset}, expected {self.received}: bytes lost or repeated")
        end = offset + len(data)
        if not data or end > len(self.buffer):
            raise StreamCorruptedError(f"a chunk ends at byte {end} of an announced {len(self.buffer)}")
        self.buffer[offset:end] = data
        self.sha256.update(self.buffer[offset:end])
        self.received = end
        self.report_bytes()

    def take_trailer(self, trailer: ghn_pb2.StreamTrailer) -> None:
        """Checks that every byte came, and that none was changed."""
        if self.header is None or self.received != len(self.buffer):
            raise StreamCorruptedError(f"the trailer came after {self.received} of {len(self.buffer)} announced bytes")
        digest = self.sha256.hexdigest()
        if trailer.sha256 != digest:
            raise StreamCorruptedError(f"the bytes were changed on their way: sha256 {digest}, not {trailer.sha256}")
        self.trailer = trailer

    def finish(self) -> ReceivedPrediction:
        """The whole reply, once the stream has ended."""
        if self.header is None or self.trailer is None:
            raise StreamCorruptedError(f"the stream ended without its trailer, after {self.received} bytes")
        tensors, metadata = decode_safetensors_header(self.buffer)
        return ReceivedPrediction(self.buffer, tensors, metadata, self.header, self.trailer)

    def report_bytes(self) -> None:
        """Tells how many bytes have arrived."""
        self.on_progress(Progress("streaming", received_bytes=self.received, total_bytes=len(self.buffer)))
