"""The forms in which users give an architecture, and the ONNX bytes that go to the server for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ghn_client.errors import InvalidArchitectureError
from ghn_client.structure import parse_onnx, strip_model

Architecture = torch.nn.Module | str | Path | bytes
"""A torch module, the path of an ONNX file, or the bytes of one."""


@dataclass(frozen=True, eq=False)
class ModelSource:
    """An architecture as it is sent, and where the model to fill is.

    Attributes:
        structure: Structure-only ONNX.
        path: The user's file, whose other tensors are read again when it is filled; None without one.
        original: The user's bytes; None without.
        values: Buffers and constants of an exported module.
    """

    structure: bytes
    path: Path | None = None
    original: bytes | None = None
    values: Mapping[str, torch.Tensor] = field(default_factory=dict)


def read_source(architecture: Architecture, example_inputs: Any = None) -> ModelSource:
    """What is sent of ``architecture``, without weights.

    Args:
        architecture: A module, a path, or bytes.
        example_inputs: What a module is called with; see ``export_architecture``.

    Raises:
        ExportError: The module cannot be exported.
        InvalidArchitectureError: The file cannot be read, or is no ONNX model.
    """
    if isinstance(architecture, torch.nn.Module):
        from ghn_client.export import export_structure

        exported = export_structure(architecture, example_inputs)
        return ModelSource(exported.onnx_bytes, values=exported.values)
    if isinstance(architecture, bytes | bytearray | memoryview):
        original = bytes(architecture)
        return ModelSource(_stripped(original), original=original)
    path = Path(architecture)
    return ModelSource(_stripped(_read_bytes(path)), path=path)


def _stripped(onnx_bytes: bytes) -> bytes:
    proto = parse_onnx(onnx_bytes)
    strip_model(proto)
    return proto.SerializeToString()


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidArchitectureError(f"cannot read the model {str(path)!r}: {error.strerror}") from error
