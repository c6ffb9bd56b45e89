"""Reads tensors out of pickled files without running what is pickled.

Two kinds are known: files of ``torch.save`` (read by torch's own restricted loader) and dumps of joblib, which are
plain pickles of tensors (read by an unpickler that knows the four names such a pickle needs, and refuses all others).
"""

from __future__ import annotations

import argparse
import collections
import io
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ghn_service.errors import CheckpointError

_PICKLE_START = b"\x80"
_ZIP_START = b"PK\x03\x04"
_TORCH_LEGACY_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)[:-1]
_COMPRESSED_STARTS = {b"x": "zlib", b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x04\x22\x4d\x18": "lz4"}
_DAMAGED = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    RuntimeError,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    OverflowError,
    MemoryError,
    ImportError,
)


def read_pickled(path: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """The state dict and, if there is one, the configuration in a pickled file.

    Raises:
        CheckpointError: The file is damaged, of another kind, or asks for code to be run.
    """
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise CheckpointError(f"cannot read {path.name!r}: {error.strerror}") from error
    load = _loader(start, path.name)
    try:
        return _state_dict(load(path), path.name)
    except _DAMAGED as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path.name!r} is damaged, or holds more than tensors and plain values; nothing in it was run: {reason}"
        ) from error


def _loader(start: bytes, name: str) -> Callable[[Path], object]:
    if start.startswith((_ZIP_START, _TORCH_LEGACY_MAGIC)):
        return _load_torch_file
    if start.startswith(_PICKLE_START):
        return _load_joblib_dump
    for magic, kind in _COMPRESSED_STARTS.items():
        if start.startswith(magic):
            raise CheckpointError(f"{name!r} is compressed ({kind}); save it again without compression")
    raise CheckpointError(
        f"{name!r} is no checkpoint of a known kind; expected a file of torch.save, a joblib dump of a state dict, or "
        f"safetensors with a .config.json beside it (it starts with {start[:8]!r})"
    )


def _load_torch_file(path: Path) -> object:
    """A file of ``torch.save``; training scripts keep their command line in it as an ``argparse.Namespace``."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _load_joblib_dump(path: Path) -> object:
    with path.open("rb") as file:
        return _TensorUnpickler(file).load()


def _load_storage(data: bytes) -> Any:
    """A storage inside a pickled tensor: a file of ``torch.save`` again, read with the same care."""
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


class _TensorUnpickler(pickle.Unpickler):
    """An unpickler for dictionaries of tensors; any other name in the pickle is an error."""

    _ALLOWED: Mapping[tuple[str, str], Callable[..., Any]] = {
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
        ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
        ("torch.storage", "_load_from_bytes"): _load_storage,
    }

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """A function that calls the allowed object; a pickle could set attributes of the object itself."""
        allowed = self._ALLOWED.get((module_name, global_name))
        if allowed is None:
            raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")
        return lambda *arguments: allowed(*arguments)


def _state_dict(loaded: object, name: str) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Finds the state dict in what a file held: bare, or under ``state_dict`` beside a ``config``."""
    config: object = {}
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        config = loaded.get("config") or {}
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping) or not loaded or not isinstance(config, Mapping):
        raise CheckpointError(f"{name!r} holds no state dict but a {type(loaded).__name__}")
    odd = [key for key, value in loaded.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if odd:
        raise CheckpointError(f"{name!r} holds no state dict: the value of {odd[0]!r} is no tensor")
    hollow = [key for key, value in loaded.items() if value.nbytes > value.untyped_storage().nbytes()]
    if hollow:
        raise CheckpointError(f"{name!r} is damaged: the tensor {hollow[0]!r} is larger than what is stored of it")
    return {key: value.detach() for key, value in loaded.items()}, config
