"""Bytes that must never change: a file of predicted weights, and a chunk on the wire, written out by hand."""

from __future__ import annotations

from google.protobuf import descriptor_pb2

from ghn_client.wire import ghn_pb2
from ghn_client.wire.codec import encode_chunks, encode_safetensors_header
from ghn_client.wire.metadata import PredictionMetadata, TensorInfo, TensorUse, encode_metadata

GOLDEN_HEADER = (
    b"\xa0\x00\x00\x00\x00\x00\x00\x00"
    b'{"__metadata__":{"format":"pt"},'
    b'"conv.weight":{"dtype":"F32","shape":[2,1,1,1],"data_offsets":[0,8]},'
    b'"b\xc3\xbc":{"dtype":"BF16","shape":[],"data_offsets":[8,10]}}'
)


def test_safetensors_header() -> None:
    tensors = {"conv.weight": ("F32", (2, 1, 1, 1)), "bü": ("BF16", ())}
    header = encode_safetensors_header(tensors, {"format": "pt"})
    assert header.rstrip(b" ") == GOLDEN_HEADER
    assert len(header) == 8 + 0xA0


def test_chunk() -> None:
    #        chunk, 19 bytes offset 300       data, 9 bytes        CRC-32C of "123456789": 0xe3069283
    golden = b"\x1a\x13" + b"\x08\xac\x02" + b"\x12\x09123456789" + b"\x1d\x83\x92\x06\xe3"
    *_, last = encode_chunks([bytes(295), b"01234", b"1234", b"56789"], chunk_bytes=300)
    assert last == golden
    chunk = ghn_pb2.PredictWeightsResponse.FromString(golden).chunk
    assert chunk == ghn_pb2.Chunk(offset=300, data=b"123456789", crc32c=0xE3069283)


def test_metadata() -> None:
    metadata = PredictionMetadata(
        model="m",
        model_digest="d",
        graph_digest="g",
        seed=7,
        dtype="float32",
        tensors=(
            TensorInfo("a", "predicted", "a", "net.a", (1, 0)),
            TensorInfo("b", "fallback:zeros", "c", uses=(TensorUse("n", 2),)),
        ),
        buffers=("bn.running_mean",),
        warnings=("careful",),
        include=("*",),
        versions={"torch": "2"},
    )
    assert encode_metadata(metadata) == {
        "format": "pt",
        "ghn.format": "ghn-prediction/1",
        "ghn.model": "m",
        "ghn.model_digest": "d",
        "ghn.graph_digest": "g",
        "ghn.seed": "7",
        "ghn.dtype": "float32",
        "ghn.tensors": (
            '[{"name":"a","origin":"predicted","initializer":"a","torch_name":"net.a","permutation":[1,0]},'
            '{"name":"b","origin":"fallback:zeros","initializer":"c","uses":[{"node":"n","input_index":2}]}]'
        ),
        "ghn.buffers": '["bn.running_mean"]',
        "ghn.warnings": '["careful"]',
        "ghn.steps": "[]",
        "ghn.low_rank": "null",
        "ghn.include": '["*"]',
        "ghn.versions": '{"torch":"2"}',
    }


def test_field_numbers() -> None:
    """Numbers are the protocol; a name may be changed, a number may not."""
    numbers = {
        message: {field.name: field.number for field in ghn_pb2.DESCRIPTOR.message_types_by_name[message].fields}
        for message in ("PredictWeightsRequest", "PredictWeightsResponse", "StreamHeader", "Chunk", "StreamTrailer")
    }
    assert numbers == {
        "PredictWeightsRequest": {
            "architecture": 1,
            "model": 2,
            "dtype": 3,
            "seed": 4,
            "steps": 5,
            "low_rank": 6,
            "include": 7,
            "request_id": 8,
            "report": 9,
            "source": 10,
            "head": 11,
        },
        "PredictWeightsResponse": {"progress": 1, "header": 2, "chunk": 3, "trailer": 4},
        "StreamHeader": {"request_id": 1, "total_bytes": 6},
        "Chunk": {"offset": 1, "data": 2, "crc32c": 3},
        "StreamTrailer": {"seconds": 2, "report_json": 3, "trust": 4},
    }


def test_numbers_of_old_fields_are_not_used_again() -> None:
    file = descriptor_pb2.FileDescriptorProto()
    ghn_pb2.DESCRIPTOR.CopyToProto(file)
    reserved = {
        message.name: {number for span in message.reserved_range for number in range(span.start, span.end)}
        for message in file.message_type
        if message.reserved_range
    }
    assert reserved == {"StreamHeader": {2, 3, 4, 5, 7, 8, 9}, "StreamTrailer": {1}}
