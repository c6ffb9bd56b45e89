"""Chunks as protobuf messages without protobuf's copies.

A chunk of a reply is a ``PredictWeightsResponse`` whose ``chunk`` is set. Through the generated classes a mebibyte of
weights is copied three times on its way out and twice on its way in; written and read by hand, following
https://protobuf.dev/programming-guides/encoding, it is copied once on the way out and not at all on the way in. The
bytes are those that the generated classes would write (a test compares them), so any client reads them, and anything
that this reader does not recognise at once goes to the generated classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ghn_client.wire import ghn_pb2

if TYPE_CHECKING:
    import grpc

SERVICE = "ghn.v1.GhnService"
PREDICT_WEIGHTS = f"/{SERVICE}/PredictWeights"

LENGTH_DELIMITED = 2
VARINT = 0
RESPONSE_CHUNK_TAG = ghn_pb2.PredictWeightsResponse.CHUNK_FIELD_NUMBER << 3 | LENGTH_DELIMITED
CHUNK_OFFSET_TAG = ghn_pb2.Chunk.OFFSET_FIELD_NUMBER << 3 | VARINT
CHUNK_DATA_TAG = ghn_pb2.Chunk.DATA_FIELD_NUMBER << 3 | LENGTH_DELIMITED


@dataclass(frozen=True, slots=True)
class DataFrame:
    """A chunk as it arrived: ``data`` is a view into the message."""

    offset: int
    data: memoryview


@dataclass(frozen=True, slots=True)
class OutgoingChunk:
    """A chunk to be sent: its bytes are ``pieces``, one behind the other."""

    offset: int
    pieces: Sequence[bytes | memoryview]


def encode_event(event: ghn_pb2.PredictWeightsResponse | OutgoingChunk) -> bytes:
    """A serialised ``PredictWeightsResponse``; the bytes of a chunk are copied once."""
    if isinstance(event, OutgoingChunk):
        return encode_chunk_frame(event.offset, event.pieces)
    return event.SerializeToString()


def encode_chunk_frame(offset: int, pieces: Sequence[bytes | memoryview]) -> bytes:
    """A serialised ``PredictWeightsResponse`` with a chunk.

    Args:
        offset: Offset of the first byte within the stream.
        pieces: The bytes of the chunk, one piece after the other; copied once.
    """
    num_bytes = sum(len(piece) for piece in pieces)
    head = b"" if offset == 0 else bytes([CHUNK_OFFSET_TAG]) + _encode_varint(offset)
    head += bytes([CHUNK_DATA_TAG]) + _encode_varint(num_bytes)
    outer = bytes([RESPONSE_CHUNK_TAG]) + _encode_varint(len(head) + num_bytes)
    return b"".join((outer, head, *pieces))


def decode_event(message: bytes) -> ghn_pb2.PredictWeightsResponse | DataFrame:
    """The event that a serialised ``PredictWeightsResponse`` holds; a chunk without copying its bytes.

    Raises:
        google.protobuf.message.DecodeError: The bytes are no such message.
    """
    frame = _decode_chunk_frame(message)
    return ghn_pb2.PredictWeightsResponse.FromString(message) if frame is None else frame


def open_prediction_stream(
    channel: grpc.Channel,
) -> grpc.UnaryStreamMultiCallable[ghn_pb2.PredictWeightsRequest, ghn_pb2.PredictWeightsResponse | DataFrame]:
    """PredictWeights as a callable of ``channel``, like the generated stub's, with chunks that are not copied."""
    return channel.unary_stream(
        PREDICT_WEIGHTS,
        request_serializer=ghn_pb2.PredictWeightsRequest.SerializeToString,
        response_deserializer=decode_event,
    )


def _decode_chunk_frame(message: bytes) -> DataFrame | None:
    """The chunk of ``message`` where it is written exactly as ``encode_chunk_frame`` does, else None."""
    try:
        if message[0] != RESPONSE_CHUNK_TAG:
            return None
        length, position = _decode_varint(message, 1)
        if position + length != len(message):
            return None
        offset = 0
        if message[position] == CHUNK_OFFSET_TAG:
            offset, position = _decode_varint(message, position + 1)
        if message[position] != CHUNK_DATA_TAG:
            return None
        num_bytes, position = _decode_varint(message, position + 1)
    except IndexError:
        return None
    if position + num_bytes != len(message) or offset >= 1 << 64:
        return None
    return DataFrame(offset, memoryview(message)[position:])


def _encode_varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


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
