"""What a serialised model takes once it is parsed, told from its bytes alone.

An empty message takes two bytes in a file and up to 200 in memory, so large files are looked through before parsing.
The format is that of https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import onnx
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from ghn_service.errors import InvalidArchitectureError
from ghn_service.graph.raw_graph import CHECK_EVERY

MOST_BYTES_PER_BYTE = 160
"""Memory that one byte of a file may take: an attribute takes two."""
_MAX_DEPTH = 100
_STRING, _NUMBER = 40, 16  # bytes in memory, measured, with room for lists that double as they grow
_VARINT, _EIGHT_BYTES, _DELIMITED, _FOUR_BYTES = 0, 1, 2, 5
_Costs = dict[int, tuple[int, int, Descriptor | None]]


def parsed_bytes(data: bytes, enough: int, check: Callable[[], None]) -> int:
    """About how much the messages and lists of a model take in memory, without strings and the data of tensors.

    Args:
        data: A serialised ``onnx.ModelProto``.
        enough: Counting ends beyond this.
        check: Called every few milliseconds.

    Raises:
        InvalidArchitectureError: The bytes are no protobuf message.
    """
    total = num_unchecked = 0
    model: Descriptor = onnx.ModelProto.DESCRIPTOR  # type: ignore[assignment]
    stack = [(0, len(data), model)]
    while stack and total <= enough:
        start, stop, message = stack.pop()
        fields = _costs(message)
        while start < stop and total <= enough:
            num_unchecked += 1
            if num_unchecked == CHECK_EVERY:
                num_unchecked = 0
                check()
            tag, start = _varint(data, start, stop)
            per_field, per_byte, inner = fields.get(tag >> 3, (0, 0, None))
            total += per_field
            if tag & 7 == _DELIMITED:
                size, start = _varint(data, start, stop)
                if size > stop - start:
                    raise _damaged()
                total += per_byte * size
                if inner is not None and size and len(stack) < _MAX_DEPTH:
                    stack.append((start + size, stop, message))
                    stop, message = start + size, inner
                    fields = _costs(message)
                else:
                    start += size
            elif tag & 7 == _VARINT:
                _, start = _varint(data, start, stop)
            elif tag & 7 in (_FOUR_BYTES, _EIGHT_BYTES):
                start += 4 if tag & 7 == _FOUR_BYTES else 8
            else:
                raise _damaged()
    return total


@functools.cache
def _costs(message: Descriptor) -> _Costs:
    """By the number of a field: what it takes in memory, what each of its bytes does, and the message that it holds."""
    costs: _Costs = {}
    for item in message.fields:
        if item.message_type is not None:
            costs[item.number] = 48 + 11 * len(item.message_type.fields), 0, item.message_type
        elif not item.is_repeated:
            continue
        elif item.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES):
            costs[item.number] = _STRING, 0, None
        elif item.type in (FieldDescriptor.TYPE_INT64, FieldDescriptor.TYPE_UINT64):  # others take what they take here
            costs[item.number] = _NUMBER, _NUMBER, None
    return costs


def _varint(data: bytes, start: int, stop: int) -> tuple[int, int]:
    """The number that starts at ``start``, and where it ends."""
    value = shift = 0
    while start < stop and shift < 70:
        byte = data[start]
        start += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, start
        shift += 7
    raise _damaged()


def _damaged() -> InvalidArchitectureError:
    return InvalidArchitectureError("expected a serialised onnx.ModelProto; the bytes are damaged or cut short")
