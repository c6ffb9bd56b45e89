"""Bytes that must never change: a file of predicted weights, and a chunk on the wire, written out by hand."""

from __future__ import annotations

from ghn_client.wire import ghn_pb2
from ghn_client.wire.codec import TensorEntry, encode_safetensors_header
from ghn_client.wire.framing import encode_chunk_frame
from ghn_client.wire.metadata import PredictionMetadata, TensorNote, TensorUse, encode_metadata

GOLDEN_HEADER = (
    b"\xa0\x00\x00\x00\x00\x00\x00\x00"
    b'{"__metadata__":{"format":"pt"},'
    b'"conv.weight":{"dtype":"F32","shape":[2,1,1,1],"data_offsets":[0,8]},'
    b'"b\xc3\xbc":{"dtype":"BF16","shape":[],"data_offsets":[8,10]}}'
)


def test_safetensors_header() -> None:
    entries = [TensorEntry("conv.weight", "F32", (2, 1, 1, 1)), TensorEntry("bü", "BF16", ())]
    header = encode_safetensors_header(entries, {"format": "pt"})
    assert header.rstrip(b" ") == GOLDEN_HEADER
    assert len(header) == 8 + 0xA0


def test_chunk() -> None:
    #        chunk, 8 bytes  offset 300    data, 3 bytes
    golden = b"\x1a\x08" + b"\x08\xac\x02" + b"\x12\x03abc"
    assert encode_chunk_frame(300, [b"a", b"bc"]) == golden
    assert ghn_pb2.PredictWeightsResponse.FromString(golden).chunk == ghn_pb2.Chunk(offset=300, data=b"abc")


def test_metadata() -> None:
    metadata = PredictionMetadata(
        model="m",
        model_digest="d",
        graph_digest="g",
        seed=7,
        dtype="float32",
        tensors=(
            TensorNote("a", "predicted", "a", "net.a", (1, 0)),
            TensorNote("b", "fallback:zeros", "c", uses=(TensorUse("n", 2),)),
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
        },
        "PredictWeightsResponse": {"progress": 1, "header": 2, "chunk": 3, "trailer": 4},
        "StreamHeader": {
            "request_id": 1,
            "model": 2,
            "model_digest": 3,
            "graph_digest": 4,
            "seed": 5,
            "total_bytes": 6,
            "tensors": 7,
            "warnings": 8,
            "dtype": 9,
        },
        "Chunk": {"offset": 1, "data": 2},
        "StreamTrailer": {"sha256": 1, "seconds": 2, "report_json": 3},
    }
