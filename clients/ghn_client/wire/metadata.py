"""What a file of predicted weights says about itself: the ``__metadata__`` of its safetensors header.

The file stands alone: it says which hypernetwork made it, for which architecture and with which options, and where each
tensor came from and goes. Nothing in it differs between two equal requests.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ghn_client.errors import FileError

FORMAT = "ghn-prediction/1"
PREFIX = "ghn."
FORMAT_KEY = PREFIX + "format"


@dataclass(frozen=True, slots=True)
class TensorUse:
    """A place of the architecture's file that reads a tensor: input ``input_index`` of the ONNX node ``node``."""

    node: str
    input_index: int


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What is known of one tensor; the fields are those of ``TensorInfo`` in the protocol.

    Attributes:
        name: Key in the file.
        origin: ``predicted``, ``tiled``, ``fallback:<rule>``, or ``source:<name> (<how>)`` with ``exact``, ``grown`` or
            ``cut``.
        initializer: Name in the architecture's file.
        torch_name: Key in the module's ``state_dict`` where it can be told, or "".
        permutation: Torch's axis i is stored axis ``permutation[i]``; empty where the layout is torch's own.
        uses: Places that read it, where an exporter merged equal tensors.
        shape: Shape as stored; of an analysis only, since a file has it beside the tensor.
        op_type: Op type of the graph node that stands for it, or ""; of an analysis only.
    """

    name: str
    origin: str
    initializer: str = ""
    torch_name: str = ""
    permutation: tuple[int, ...] = ()
    uses: tuple[TensorUse, ...] = ()
    shape: tuple[int, ...] = ()
    op_type: str = ""


_FIELDS_IN_FILES = ("name", "origin", "initializer", "torch_name", "permutation", "uses")


@dataclass(frozen=True, slots=True)
class PredictionMetadata:
    """What a file of predicted weights says about itself.

    Attributes:
        model: Name of the hypernetwork.
        model_digest: sha256 of its checkpoint, in hexadecimal.
        graph_digest: Digest of the architecture, in hexadecimal.
        seed: Seed of everything that was drawn.
        dtype: ``float32``, ``float16`` or ``bfloat16``.
        tensors: Every tensor of the file, in its order.
        buffers: Float tensors of the architecture that are not weights (running statistics), and not in the file.
        warnings: What the user should know; sentences.
        steps: What each post-processing step did, as JSON values.
        low_rank: What became of each layer, as JSON values; None for dense weights.
        include: Patterns that chose the tensors; empty for all.
        versions: Version by package.
        transfer: What a source gave, as ``ghn.v1.TransferSummary`` in protobuf's JSON mapping; None without a source.
        trust: How much to expect of the weights, as the fields of ``ghn_client.info.Trust``; None in older files.
    """

    model: str
    model_digest: str
    graph_digest: str
    seed: int
    dtype: str
    tensors: tuple[TensorInfo, ...]
    buffers: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    steps: tuple[Mapping[str, Any], ...] = ()
    low_rank: Mapping[str, Any] | None = None
    include: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    transfer: Mapping[str, Any] | None = None
    trust: Mapping[str, Any] | None = None


_LATER_FIELDS = ("transfer", "trust")
"""Fields that files have only where they say something, and older ones never."""


def encode_metadata(metadata: PredictionMetadata) -> dict[str, str]:
    """The metadata as text by key: plain text where the field is text, else JSON."""
    encoded = {"format": "pt", FORMAT_KEY: FORMAT}  # other readers look for the first: torch's conventions
    for item in dataclasses.fields(metadata):
        value = getattr(metadata, item.name)
        if item.name in _LATER_FIELDS and value is None:
            continue
        if item.name == "tensors":
            value = list(map(_encode_tensor, value))
        is_text = isinstance(value, str)
        encoded[PREFIX + item.name] = value if is_text else json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return encoded


def decode_metadata(encoded: Mapping[str, str]) -> PredictionMetadata:
    """The metadata that ``encode_metadata`` wrote; keys of newer versions are passed over.

    Raises:
        FileError: The file was not written by this service, or its metadata is damaged.
    """
    if encoded.get(FORMAT_KEY) != FORMAT:
        raise FileError(
            f"expected a safetensors file with {FORMAT_KEY}={FORMAT!r} in its metadata, got {encoded.get(FORMAT_KEY)!r}"
        )
    try:
        values: dict[str, Any] = {}
        for item in dataclasses.fields(PredictionMetadata):
            if item.name in _LATER_FIELDS and PREFIX + item.name not in encoded:
                continue
            text = encoded[PREFIX + item.name]
            values[item.name] = text if item.type == "str" else json.loads(text)
        for name in ("buffers", "warnings", "steps", "include"):
            values[name] = tuple(values[name])
        values["tensors"] = tuple(map(_decode_tensor, values["tensors"]))
        return PredictionMetadata(**values)
    except (KeyError, TypeError, ValueError) as error:
        raise FileError(f"the metadata of the prediction is damaged: {error!r}") from error


def _encode_tensor(tensor: TensorInfo) -> dict[str, Any]:
    """The fields that are not empty; ``dataclasses.asdict`` would take most of a reply's preparation."""
    values = {name: value for name in _FIELDS_IN_FILES if (value := getattr(tensor, name))}
    if tensor.uses:
        values["uses"] = [dataclasses.asdict(use) for use in tensor.uses]
    return values


def _decode_tensor(entry: Mapping[str, Any]) -> TensorInfo:
    values = {name: value for name, value in entry.items() if name in _FIELDS_IN_FILES}
    values["permutation"] = tuple(values.get("permutation", ()))
    values["uses"] = tuple(TensorUse(**use) for use in values.get("uses", ()))
    return TensorInfo(**values)
