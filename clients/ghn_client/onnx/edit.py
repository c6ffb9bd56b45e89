"""ONNX models as messages: read, walked through, changed and written.

Files of users are changed as protobuf messages, not through an intermediate representation, so that what was not asked
for stays to the byte.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import onnx
import onnx.numpy_helper
import torch
from google.protobuf.message import DecodeError
from onnx.external_data_helper import load_external_data_for_model

from ghn_client.atomic_file import replaced_file, write_file
from ghn_client.errors import InvalidArchitectureError

OnnxModel = onnx.ModelProto
"""For those who hand models on without touching them."""

TORCH_DTYPES: dict[int, torch.dtype] = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.DOUBLE: torch.float64,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.BFLOAT16: torch.bfloat16,
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.BOOL: torch.bool,
    onnx.TensorProto.UINT8: torch.uint8,
    onnx.TensorProto.INT8: torch.int8,
}
"""Element types of ONNX tensors in torch."""

ONNX_TYPES = {dtype: number for number, dtype in TORCH_DTYPES.items()}

Message = TypeVar("Message", onnx.ModelProto, onnx.NodeProto)

FIRST_IR_VERSION_WITHOUT_INPUTS = 4
"""Files of older versions list every initializer among the inputs."""

EXTERNAL_BYTES = (1 << 31) - (1 << 24)
"""Bytes of tensors from which a file keeps them beside itself: protobuf ends at 2 GiB."""


def parse_onnx(onnx_bytes: bytes) -> onnx.ModelProto:
    """The model message in ``onnx_bytes``.

    Raises:
        InvalidArchitectureError: The bytes are no ONNX model.
    """
    try:
        model = onnx.ModelProto.FromString(onnx_bytes)
    except DecodeError as error:
        raise InvalidArchitectureError(
            f"the {len(onnx_bytes)} bytes are no ONNX model ({error}); export_architecture(module, example_inputs) or"
            " torch.onnx.export make one, and a checkpoint of weights alone has no architecture"
        ) from error
    if not model.graph.node and not model.graph.output:
        raise InvalidArchitectureError("expected an ONNX model, got a message without a graph")
    return model


def read_model(path: str | Path) -> onnx.ModelProto:
    """An ONNX file with the data that lies beside it.

    Raises:
        InvalidArchitectureError: It cannot be read, or is no ONNX model.
    """
    try:
        model = parse_onnx(Path(path).read_bytes())
        load_external(model, Path(path))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise InvalidArchitectureError(f"cannot read the model {str(path)!r}: {error}") from error
    return model


def tensors_of(model: onnx.ModelProto) -> dict[str, torch.Tensor]:
    """The floating-point tensors of a model by name, of initializers and constants; the model's own lose their bytes.

    Raises:
        InvalidArchitectureError: The bytes of a tensor do not fit its shape.
    """
    tensors: dict[str, torch.Tensor] = {}
    for graph in graphs(model.graph):
        constants = [(node.output[0], item.t) for node in graph.node if node.op_type == "Constant"
                     for item in node.attribute if item.name == "value"]  # fmt: skip
        for name, proto in [*((item.name, item) for item in graph.initializer), *constants]:
            dtype = TORCH_DTYPES.get(proto.data_type)
            has_data = proto.HasField("raw_data") or proto.float_data or proto.double_data or proto.int32_data
            if dtype is None or not dtype.is_floating_point or not has_data:
                continue
            try:
                if proto.HasField("raw_data"):
                    values = torch.frombuffer(bytearray(proto.raw_data), dtype=dtype)
                    proto.ClearField("raw_data")
                elif dtype == torch.bfloat16:
                    values = torch.tensor(list(proto.int32_data), dtype=torch.int32).to(torch.int16).view(dtype)
                else:
                    values = torch.from_numpy(onnx.numpy_helper.to_array(proto).copy())
                tensors[name] = values.reshape(tuple(proto.dims))
            except (ValueError, RuntimeError) as error:
                raise InvalidArchitectureError(f"the tensor {name!r} of the model is damaged: {error}") from error
    return tensors


def load_external(model: onnx.ModelProto, path: Path) -> None:
    """Reads the tensors that lie beside the file at ``path``, or beside the one that it links to."""
    with contextlib.suppress(OSError, ValueError, onnx.checker.ValidationError):
        load_external_data_for_model(model, str(path.parent))
    load_external_data_for_model(model, str(path.resolve().parent))


def write_model(model: onnx.ModelProto, path: Path) -> None:
    """Writes a model, above 2 GB with its tensors beside it; a link stays, and the file that it leads to is replaced.

    Raises:
        FileError: It cannot be written.
    """
    size = sum(tensor.ByteSize() for graph in graphs(model.graph) for tensor in graph.initializer)
    if size < EXTERNAL_BYTES:
        write_file(path, model.SerializeToString())
        return
    path = Path(os.path.realpath(path))
    with replaced_file(path) as part, tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        data_name = f"{path.name}.data"
        written = Path(folder) / path.name
        onnx.save_model(model, written, save_as_external_data=True, all_tensors_to_one_file=True, location=data_name)
        if (Path(folder) / data_name).exists():
            (Path(folder) / data_name).replace(path.parent / data_name)
        written.replace(part)


def copied(message: Message) -> Message:
    """A copy of a message, which may be changed."""
    result = type(message)()
    result.CopyFrom(message)
    return result


def tensor_proto(name: str, tensor: torch.Tensor, data_type: int | None = None) -> onnx.TensorProto:
    """A torch tensor as an initializer, converted to ``data_type`` if that is given."""
    values = tensor.detach().to(device="cpu", dtype=tensor.dtype if data_type is None else TORCH_DTYPES[data_type])
    proto = onnx.TensorProto(name=name, dims=values.shape, data_type=data_type or ONNX_TYPES[tensor.dtype])
    proto.raw_data = values.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return proto


def graphs(owner: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.GraphProto]:
    """A graph and every graph inside of it, outer ones first."""
    if isinstance(owner, onnx.GraphProto):
        yield owner
    for node in owner.node:
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs:
                yield from graphs(inner)


def with_own_tensors(model: onnx.ModelProto) -> onnx.ModelProto:
    """Gives every layer a tensor of its own where an exporter had merged equal ones behind Identity nodes."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    merged = [node for node in model.graph.node if node.op_type == "Identity" and node.input[0] in tensors]
    if not merged:
        return model
    result = copied(model)
    for node in merged:
        own = result.graph.initializer.add()
        own.CopyFrom(tensors[node.input[0]])
        own.name = node.output[0]
        result.graph.node.remove(node)
    return result
