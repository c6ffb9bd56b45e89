"""Sources: trained networks that weights are taken from, as files, and the library that a server finds them in.

A source is one safetensors file, named as the source is. Its tensors have the names of the parameters and buffers of
its structure; its metadata has one entry, ``ghn_source``: a JSON object of ``format``, ``card`` and ``structure``
(base64 of the zlib-compressed ONNX model without weights). It holds no code. It is one entry because safetensors writes
several in random order; equal sources have equal digests.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import dataclasses
import hashlib
import json
import math
import threading
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ghn_client.atomic_file import file_digest, replaced_file
from ghn_service.errors import SourceError, UnknownModelError, reason_of
from ghn_service.transfer import BUNDLED_SOURCES
from ghn_service.transfer.source import Source, SourceCard

METADATA_KEY = "ghn_source"
FORMAT = "ghn-source/1"
SUFFIX = ".safetensors"
AUTO = "auto"
MAX_STRUCTURE_BYTES = 64 * 2**20
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes per element, by the element types that a source may have."""


@dataclass(frozen=True, slots=True)
class SourceSummary:
    """What a source's file holds.

    Attributes:
        name: Stem of the file.
        card: What people should know.
        digest: sha256 of the file, in hexadecimal.
        num_parameters: Scalars in its tensors.
        num_bytes: Bytes of its tensors.
    """

    name: str
    card: SourceCard
    digest: str
    num_parameters: int
    num_bytes: int


def save_source(
    path: Path,
    structure: bytes,
    tensors: Mapping[str, torch.Tensor],
    *,
    card: SourceCard | None = None,
    dtype: torch.dtype | None = None,
) -> SourceSummary:
    """Writes a source; the file appears under its name only when it is complete.

    Args:
        path: ``NAME.safetensors``.
        structure: The ONNX model without weights, as ``export_architecture`` gives it.
        tensors: Weights and running statistics by name in the structure, in the file's layout; what is no
            floating-point tensor is left out.
        card: What people should know of it.
        dtype: ``torch.float16`` to halve the file, but for tensors with values beyond it; None keeps each tensor's own.

    Raises:
        SourceError: The file cannot be written, has no usable name, or a tensor has values that are no numbers.
    """
    if path.suffix != SUFFIX or path.stem in ("", AUTO):
        raise SourceError(f"expected a file NAME{SUFFIX}, not called {AUTO!r}; got {path.name!r}")
    kept = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    for name, tensor in kept.items():
        if not torch.isfinite(tensor).all():
            raise SourceError(f"the source's tensor {name!r} has values that are no numbers")
    values = {name: _narrowed(tensor.detach().cpu(), dtype) for name, tensor in kept.items()}
    description = {
        "format": FORMAT,
        "card": dataclasses.asdict(card or SourceCard()),
        "structure": base64.b64encode(zlib.compress(structure, 9)).decode(),
    }
    try:
        with replaced_file(path) as part:
            save_file(values, part, metadata={METADATA_KEY: json.dumps(description)})
    except (OSError, SafetensorError) as error:
        raise SourceError(f"cannot write the source {path.name!r}: {reason_of(error)}") from error
    return read_summary(path)


def load_source(path: Path) -> Source:
    """Reads a source.

    Args:
        path: A file that ``save_source`` wrote.

    Raises:
        SourceError: The file is missing, damaged or of another kind.
    """
    with _opened(path) as (file, card, structure):
        # Copies: tensors of a file are views of it, which change with it.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    return Source(path.stem, structure, tensors, card, digest=file_digest(path))


def read_summary(path: Path) -> SourceSummary:
    """What a source's file holds, without its tensors; raises as ``load_source``."""
    with _opened(path) as (file, card, _):
        slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118
        sizes = [(math.prod(item.get_shape()), BYTES[item.get_dtype()]) for item in slices]
    num_bytes = sum(count * num_bytes for count, num_bytes in sizes)
    return SourceSummary(path.stem, card, file_digest(path), sum(count for count, _ in sizes), num_bytes)


class Library:
    """The sources of some folders, and those that are lent for a while; threads may share it.

    A file that appears in a folder is found without a restart; what is no source is passed over and named by
    ``failures``.

    Args:
        folders: Where ``NAME.safetensors`` files lie; of two sources of one name, that of the first folder counts.
    """

    def __init__(self, folders: Sequence[Path] = (BUNDLED_SOURCES,)) -> None:
        self.folders = tuple(folders)
        self.failures: dict[str, str] = {}
        self._read: dict[Path, tuple[tuple[int, int, int], SourceSummary]] = {}
        self._lent: dict[str, Source] = {}
        self._lock = threading.Lock()

    def summaries(self) -> tuple[SourceSummary, ...]:
        """Every source in the folders, by name."""
        return tuple(summary for _, summary in self._found().values())

    def load(self, name: str) -> Source:
        """The source of this name, with its tensors.

        Raises:
            UnknownModelError: There is none.
            SourceError: Its file is damaged.
        """
        with self._lock:
            if name in self._lent:
                return self._lent[name]
        found = self._found()
        if name in found:
            return load_source(found[name][0])
        raise UnknownModelError(
            f"this server's library has no source {name!r}; known are {', '.join(found) or 'none'}; {AUTO!r} chooses",
            field="source",
        )

    def outline(self, name: str) -> Source:
        """As ``load``, with tensors that have shapes and no values: enough to plan."""
        with self._lock:
            if name in self._lent:
                return self._lent[name]
        found = self._found()
        if name not in found:
            return self.load(name)
        path, summary = found[name]
        with _opened(path) as (file, card, structure):
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        return Source(name, structure, tensors, card, digest=summary.digest)

    def size(self, name: str) -> int:
        """Bytes that loading this source takes; 0 for one that is lent and in memory already, or unknown."""
        return next((summary.num_bytes for summary in self.summaries() if summary.name == name), 0)

    def digest(self, name: str) -> str:
        """What changes when a source of this name does, or for ``auto`` any; "" for one that is lent, or unknown."""
        digests = {summary.name: summary.digest for summary in self.summaries()}
        return repr(sorted(digests.items())) if name == AUTO else digests.get(name, "")

    @contextlib.contextmanager
    def lend(self, source: Source) -> Iterator[str]:
        """Makes a source of this process known until the body ends; gives the name to load it by, which is no other's.

        Args:
            source: Keeps its own name in what is said of it.
        """
        key = f"lent:{uuid.uuid4().hex}"
        with self._lock:
            self._lent[key] = source
        try:
            yield key
        finally:
            with self._lock:
                del self._lent[key]

    def _found(self) -> dict[str, tuple[Path, SourceSummary]]:
        """Path and summary of every source in the folders, by name; a file is read again only where it has changed."""
        found: dict[str, tuple[Path, SourceSummary]] = {}
        failures: dict[str, str] = {}
        with self._lock:
            for path in (path for folder in self.folders for path in sorted(folder.glob(f"*{SUFFIX}"))):
                try:
                    status = path.stat()
                    state = (status.st_ino, status.st_size, status.st_mtime_ns)
                    if self._read.get(path, ((), None))[0] != state:
                        self._read[path] = state, read_summary(path)
                    found.setdefault(path.stem, (path, self._read[path][1]))
                except (SourceError, OSError) as error:
                    failures[path.name] = str(error)
            self.failures = failures
        return dict(sorted(found.items()))


def digest_of(structure: bytes, tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 of a source that is in no file, in hexadecimal."""
    found = hashlib.sha256(structure)
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, SourceCard, bytes]]:
    """The open file of a source, its card and its structure."""
    if not path.is_file():
        raise SourceError(f"there is no source {path.name!r}")
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if (dtype := file.get_slice(name).get_dtype()) not in BYTES:
                    raise SourceError(f"{path.name!r}: expected tensors of {', '.join(BYTES)}, {name!r} is {dtype}")
            yield file, *_decode_metadata(file.metadata(), path.name)
    except (OSError, SafetensorError) as error:
        raise SourceError(f"cannot read the source {path.name!r}: {reason_of(error)}") from error


def _decode_metadata(metadata: Mapping[str, str] | None, name: str) -> tuple[SourceCard, bytes]:
    """Card and structure in a file's metadata."""
    if metadata is None or METADATA_KEY not in metadata:
        raise SourceError(
            f"{name!r} is a safetensors file, but no source; give the network that the weights belong to beside it, "
            "or make a source of both with `ghn-server add-source`"
        )
    try:
        description = json.loads(metadata[METADATA_KEY])
        if description["format"] != FORMAT:
            raise SourceError(f"{name!r} has the format {description['format']!r}; this version reads {FORMAT!r}")
        decoder = zlib.decompressobj()
        structure = decoder.decompress(base64.b64decode(description["structure"], validate=True), MAX_STRUCTURE_BYTES)
        if not decoder.eof:
            raise SourceError(f"the structure in {name!r} is cut off, or has more than {MAX_STRUCTURE_BYTES} bytes")
        return _decode_card(description["card"]), structure
    except (KeyError, ValueError, TypeError, AttributeError, binascii.Error, zlib.error) as error:
        raise SourceError(f"the metadata of {name!r} is damaged: {error!r}") from error


def _decode_card(values: Mapping[str, Any]) -> SourceCard:
    """The card in a file's metadata; what a newer version says more is kept among the details."""
    fields = {item.name for item in dataclasses.fields(SourceCard)}
    known = {key: value for key, value in values.items() if key in fields}
    known["class_names"] = tuple(map(str, known.get("class_names", ())))
    known["normalization"] = {key: tuple(map(float, part)) for key, part in known.get("normalization", {}).items()}
    known["details"] = {key: value for key, value in values.items() if key not in fields} | known.get("details", {})
    return SourceCard(**known)


def _narrowed(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """The tensor in ``dtype`` where its values fit, in memory of its own."""
    narrow = tensor if dtype is None else tensor.to(dtype)
    return (narrow if torch.isfinite(narrow).all() else tensor).contiguous().clone()
