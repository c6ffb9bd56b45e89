"""Checkpoints: safetensors files that hold a hypernetwork's weights, configuration and vocabulary, and no code.

The metadata has one entry, ``ghn_checkpoint``: a JSON object of ``format``, ``config`` (with the op vocabulary by name)
and ``card``. It is one entry because safetensors writes several in random order; equal checkpoints have equal digests.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ghn_client.atomic_file import file_digest, replaced_file
from ghn_service.errors import CheckpointError, reason_of
from ghn_service.hypernetwork.config import GHNConfig, decode_config, encode_config
from ghn_service.hypernetwork.ghn import GraphHyperNetwork

METADATA_KEY = "ghn_checkpoint"
FORMAT = "ghn-checkpoint/1"
MAX_NAMED_KEYS = 5


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What people should know of a checkpoint.

    Attributes:
        dataset: Data that it was trained on, such as ``"cifar10"``; "" if unknown.
        class_names: Names of the classes, in order; may be empty.
        trained_on: Architectures it was trained on, or where it comes from, in words.
        protocol: How it was trained, in words.
        details: Anything else, as values for JSON.
    """

    dataset: str = ""
    class_names: tuple[str, ...] = ()
    trained_on: str = ""
    protocol: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CheckpointSummary:
    """What a checkpoint file holds.

    Attributes:
        config: Sizes and choices.
        card: What people should know.
        digest: sha256 of the file, in hexadecimal.
        num_parameters: Scalars in the hypernetwork.
        num_bytes: Size of the file.
    """

    config: GHNConfig
    card: ModelCard
    digest: str
    num_parameters: int
    num_bytes: int

    @property
    def kind(self) -> str:
        """``ghn2``, ``ghn3`` or ``logah``."""
        return self.config.kind


def save_checkpoint(ghn: GraphHyperNetwork, path: Path, *, card: ModelCard | None = None) -> CheckpointSummary:
    """Writes a checkpoint; the file appears under its name only when it is complete.

    Args:
        ghn: The hypernetwork, on any device.
        path: File to write, usually ``*.safetensors``.
        card: What people should know of it.

    Raises:
        CheckpointError: The file cannot be written.
    """
    card = card or ModelCard()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in ghn.state_dict().items()}
    description = {"format": FORMAT, "config": encode_config(ghn.config), "card": dataclasses.asdict(card)}
    try:
        with replaced_file(path) as part:
            save_file(tensors, part, metadata={METADATA_KEY: json.dumps(description)})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write the checkpoint {path.name!r}: {reason_of(error)}") from error
    return CheckpointSummary(ghn.config, card, file_digest(path), ghn.num_parameters, path.stat().st_size)


def load_checkpoint(path: Path, *, device: torch.device | str = "cpu") -> tuple[GraphHyperNetwork, CheckpointSummary]:
    """Reads a checkpoint; the hypernetwork comes in evaluation mode and in float32.

    Args:
        path: A file that ``save_checkpoint`` wrote.
        device: Where to put the hypernetwork.

    Raises:
        CheckpointError: The file is missing, damaged, of another kind, or does not fit its own configuration.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path.name!r}; `ghn-server checkpoints` lists published ones")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            config, card = _decode_metadata(file.metadata(), path.name)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        digest, num_bytes = file_digest(path), path.stat().st_size
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the checkpoint {path.name!r}: {reason_of(error)}") from error
    ghn = build_ghn(config, tensors, source=path.name)
    return ghn, CheckpointSummary(config, card, digest, ghn.num_parameters, num_bytes)


def build_ghn(config: GHNConfig, tensors: Mapping[str, Tensor], *, source: str) -> GraphHyperNetwork:
    """A hypernetwork of this configuration that holds these tensors, as float32; ``source`` names them in messages.

    Raises:
        CheckpointError: Names, shapes or dtypes do not fit the configuration.
    """
    with torch.device("meta"):
        ghn = GraphHyperNetwork(config)
    missing, surplus = sorted(set(ghn.state_dict()) - set(tensors)), sorted(set(tensors) - set(ghn.state_dict()))
    if missing or surplus:
        raise CheckpointError(
            f"{source!r} does not fit its configuration ({config.kind}): "
            f"missing tensors {missing[:MAX_NAMED_KEYS]}, surplus tensors {surplus[:MAX_NAMED_KEYS]}"
        )
    for name, expected in ghn.state_dict().items():
        tensor = tensors[name]
        if tensor.shape != expected.shape or not tensor.is_floating_point():
            raise CheckpointError(
                f"{source!r}: tensor {name!r} is {tensor.dtype} {tuple(tensor.shape)}, but its configuration asks for "
                f"floats of shape {tuple(expected.shape)}"
            )
    # Copies, because tensors of a file are views of it: they would change with the file, and are not aligned in memory,
    # on which the last bit of products depends.
    ghn.load_state_dict({name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}, assign=True)
    return ghn.eval()


def _decode_metadata(metadata: Mapping[str, str] | None, source: str) -> tuple[GHNConfig, ModelCard]:
    """The configuration and card in a file's metadata."""
    if metadata is None or METADATA_KEY not in metadata:
        raise CheckpointError(
            f"{source!r} is a safetensors file, but no checkpoint of ghn-service; published ones are converted "
            "by `ghn-server import-checkpoint`"
        )
    try:
        description = json.loads(metadata[METADATA_KEY])
        if description["format"] != FORMAT:
            raise CheckpointError(
                f"{source!r} has the format {description['format']!r}; this version of ghn-service reads {FORMAT!r}"
            )
        card = ModelCard(**{**description["card"], "class_names": tuple(description["card"]["class_names"])})
        return decode_config(description["config"]), card
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"the metadata of {source!r} is damaged: {error}") from error
