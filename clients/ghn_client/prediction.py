"""``Prediction``: predicted weights as a mapping of tensors that knows where each came from and where it goes."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from google.protobuf.json_format import ParseDict, ParseError

from ghn_client.atomic_file import write_file
from ghn_client.batchnorm import evaluation_mode
from ghn_client.errors import FileError, LoadError, StreamCorruptedError
from ghn_client.info import Transfer, Trust, decode_transfer
from ghn_client.loading import LoadReport, load_parameters
from ghn_client.onnx.edit import write_model
from ghn_client.onnx.export import Architecture, ModelSource, read_source
from ghn_client.onnx.fill import fill_model
from ghn_client.outputs import largest_relative_difference
from ghn_client.report_page import describe_prediction, embed_page, render_page
from ghn_client.wire import ghn_pb2
from ghn_client.wire.codec import decode_safetensors_header
from ghn_client.wire.metadata import PredictionMetadata, TensorInfo, decode_metadata

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, eq=False)
class Prediction(Mapping[str, torch.Tensor]):
    """Predicted weights: a mapping of name in the architecture's file to tensor, in the file's layout.

    The tensors are views of one buffer, which is the safetensors file itself: no second copy is made.

    Attributes:
        buffer: The safetensors file.
        tensors: The tensors by name, in file order.
        metadata: What the file says about itself.
        seconds: Seconds that the server spent, by what it did; empty for a loaded file.
        report: The diversity report, if it was asked for.
        source: The architecture that it was made for; None for a loaded file.
        statistics: Running means and variances that came with a source's weights, by name; no weights themselves.
    """

    buffer: bytearray | memoryview
    tensors: Mapping[str, torch.Tensor]
    metadata: PredictionMetadata
    seconds: Mapping[str, float] = field(default_factory=dict)
    report: Mapping[str, Any] | None = None
    source: ModelSource | None = None
    statistics: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @staticmethod
    def from_buffer(
        buffer: bytearray | memoryview,
        *,
        trailer: ghn_pb2.StreamTrailer | None = None,
        source: ModelSource | None = None,
    ) -> Prediction:
        """The prediction in a whole safetensors file, and in the trailer of the stream that brought it.

        Raises:
            StreamCorruptedError: The file is damaged.
            FileError: It is not one of this service.
        """
        placed, encoded = decode_safetensors_header(buffer)
        tensors: dict[str, torch.Tensor] = {}
        for name, item in placed.items():
            dtype = DTYPES[item.dtype]
            count = (item.stop - item.start) // dtype.itemsize
            flat = torch.empty(0, dtype=dtype)
            if count:  # torch takes no empty buffer
                flat = torch.frombuffer(buffer, dtype=dtype, count=count, offset=item.start)
            tensors[name] = flat.reshape(item.shape)
        metadata = decode_metadata(encoded)
        measured = set((metadata.transfer or {}).get("statistics", ()))
        return Prediction(
            buffer=buffer,
            tensors={name: tensor for name, tensor in tensors.items() if name not in measured},
            statistics={name: tensor for name, tensor in tensors.items() if name in measured},
            metadata=metadata,
            seconds=dict(trailer.seconds) if trailer else {},
            report=json.loads(trailer.report_json) if trailer and trailer.report_json else None,
            source=source,
        )

    @staticmethod
    def load(path: str | Path) -> Prediction:
        """Reads what ``save`` wrote.

        Raises:
            FileError: The file cannot be read, is damaged, or was not written by this service.
        """
        try:
            with Path(path).open("rb") as file:
                buffer = bytearray(Path(path).stat().st_size)
                file.readinto(buffer)
            return Prediction.from_buffer(buffer)
        except OSError as error:
            raise FileError(f"cannot read {str(path)!r}: {error.strerror}") from error
        except StreamCorruptedError as error:
            raise FileError(f"{str(path)!r} is no whole safetensors file: {error}") from error

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __repr__(self) -> str:
        size = f"{len(self)} tensors, {self.num_parameters:,} parameters"
        return f"Prediction({size}, model={self.metadata.model!r}, trust={self.trust.verdict!r})"

    def _repr_html_(self) -> str:
        return embed_page(self.report_page())

    def report_page(self) -> str:
        """The prediction as one self-contained HTML page: verdict, network, and diversity if a report was asked for."""
        return render_page(describe_prediction(self))

    @cached_property
    def trust(self) -> Trust:
        """How much to expect of the weights."""
        told = self.metadata.trust
        return Trust(**{**told, "reasons": tuple(told["reasons"])}) if told else Trust()

    @cached_property
    def digest(self) -> str:
        """sha256 of the file, in hexadecimal; equal requests give equal digests."""
        return hashlib.sha256(self.buffer).hexdigest()

    @cached_property
    def notes(self) -> Mapping[str, TensorInfo]:
        """What is known of each tensor, by its name."""
        unknown = {name: TensorInfo(name, "", initializer=name) for name in self.tensors}
        return unknown | {note.name: note for note in self.metadata.tensors}

    @property
    def origins(self) -> Mapping[str, str]:
        """``predicted``, ``tiled``, ``fallback:<rule>`` or ``source:<name> (<how>)`` by name."""
        return {name: note.origin for name, note in self.notes.items()}

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know; sentences."""
        return self.metadata.warnings

    @cached_property
    def transfer(self) -> Transfer | None:
        """What a source gave: exactly its function, or what was cut and left out; None without a source.

        Raises:
            FileError: The file's metadata is damaged.
        """
        if self.metadata.transfer is None:
            return None
        try:
            summary = ParseDict(dict(self.metadata.transfer), ghn_pb2.TransferSummary(), ignore_unknown_fields=True)
            return decode_transfer(summary)
        except (ParseError, ValueError) as error:
            raise FileError(f"the metadata of the prediction is damaged: {error}") from error

    @property
    def needs_recalibration(self) -> bool:
        """Whether running statistics have to be measured on data, as ``recalibrate_batchnorm`` does.

        Those of a source belong to its function: where the network computes that, measuring them anew loses accuracy.
        """
        found = self.transfer
        if found is not None and not found.contains_source and self.statistics:
            return True
        return any(name.endswith(("running_mean", "running_var")) for name in self.metadata.buffers)

    @property
    def num_parameters(self) -> int:
        """Scalars in all tensors together."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The tensors under their names in the module's ``state_dict`` and in torch's layout.

        A tensor whose torch name cannot be told keeps the name that it has in the file.
        """
        state: dict[str, torch.Tensor] = {}
        for name, tensor in self.tensors.items():
            note = self.notes[name]
            key = note.torch_name if note.torch_name and note.torch_name not in state else name
            state[key] = tensor.permute(note.permutation) if note.permutation else tensor
        return state

    def load_into(self, module: torch.nn.Module, *, strict: bool = True, assign: bool = False) -> LoadReport:
        """Puts the weights into ``module``; see ``load_parameters``.

        Raises:
            LoadError: They do not fit, and ``strict``; the module is unchanged then.
        """
        state = self.state_dict()
        origins = {key: self.notes[name].origin for key, name in zip(state, self.tensors, strict=True)}
        return load_parameters(
            module,
            state,
            strict=strict,
            assign=assign,
            origins=origins,
            statistics=self.statistics,
            trust=self.trust,
        )

    def verify(self, source: torch.nn.Module, target: torch.nn.Module, inputs: Any) -> float:
        """The certificate of a transfer: how far the outputs of a source and of a network with these weights are apart.

        Args:
            source: The trained network.
            target: The network that the weights are for; it is left as it is.
            inputs: What both are called with: a tensor, a tuple of arguments, or a dict of keyword arguments.

        Returns:
            max |source - target| / rms(source) in evaluation mode, the largest of all outputs; a transfer that says
            that it is exact stays below 1e-4 in float32.

        Raises:
            LoadError: The weights do not fit the target, or the outputs are of different shapes.
        """
        loaded = copy.deepcopy(target)
        self.load_into(loaded)
        with evaluation_mode(source), evaluation_mode(loaded), torch.no_grad():
            outputs = [_call(network, inputs) for network in (source, loaded)]
        try:
            return largest_relative_difference(*outputs)
        except ValueError as error:
            raise LoadError(f"source and target cannot be compared: {error}") from error

    def save(self, path: str | Path) -> None:
        """Writes the safetensors file whole, or raises a ``FileError`` and leaves what was there."""
        write_file(path, self.buffer)

    def to_onnx(self, path: str | Path, *, model: Architecture | None = None, example_inputs: Any = None) -> None:
        """Writes the model with the predicted weights in it.

        A user's own file stays as it is but for its weights; a module gives the file that was exported from it, with
        its present buffers. Above 2 GB the weights go into ``<path>.data`` beside it.

        Args:
            path: Where to write.
            model: The model to fill, for a prediction that was loaded from a file; None for what was predicted.
            example_inputs: What a module is called with.

        Raises:
            LoadError: The weights do not fit the model, or there is no model.
        """
        source = self.source if model is None else read_source(model, example_inputs)
        write_model(fill_model(self, source), Path(path))


def _call(network: torch.nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return network(**inputs)
    return network(*inputs) if isinstance(inputs, list | tuple) else network(inputs)
