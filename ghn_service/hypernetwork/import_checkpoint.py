"""Turns published hypernetworks into our checkpoints: other names for the same tensors, and an explicit configuration.

Known are GHN-3 (T, S, L, XL; bare state dicts dumped by joblib, or training files of torch), GHN-2 (ppuda's files,
whose decoders are 1x1 convolutions), and safetensors files with the official names and a ``.config.json`` beside them.
Nothing that is pickled is run: files of ``torch.save`` are read by torch's own restricted loader, and dumps of joblib,
which are plain pickles of tensors, by an unpickler that knows the four names such a pickle needs and refuses others.
Legend: C hidden channels, (Mo, Mi, Mh, Mw) largest decoded block.
"""

from __future__ import annotations

import argparse
import collections
import io
import json
import math
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ghn_service.errors import CheckpointError
from ghn_service.graph.op_types import OP_TYPE_NAMES
from ghn_service.hypernetwork.checkpoint import CheckpointSummary, ModelCard, build_ghn, save_checkpoint
from ghn_service.hypernetwork.config import GHNConfig

PUBLISHED_OP_TYPES = OP_TYPE_NAMES[:15]
VIRTUAL_EDGE_CUTOFF = 50

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

# Official name -> ours; the rest of the name (".weight", ".bias") stays.
_RENAMES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(official), ours)
    for official, ours in (
        (r"ln\.", r"output_norm."),
        (r"embed\.", r"node_encoder.type_embedding."),
        (r"shape_enc\.embed_(channel|spatial)\.", r"node_encoder.\1_embedding."),
        (r"(?:gnn\.0\.)?centrality_embed_(in|out)\.", r"encoder.\1_degree_embedding."),
        (r"(?:gnn\.0\.)?input_dist_embed\.", r"encoder.input_distance_embedding."),
        (r"gnn\.0\.attn\.edge_embed\.embed\.", r"encoder.distance_bias.distance_embedding."),
        (r"gnn\.0\.attn\.proj_e\.0\.", r"encoder.distance_bias.hidden."),
        (r"gnn\.0\.attn\.proj_e\.2\.", r"encoder.distance_bias.heads."),
        (r"gnn\.(\d+)\.ln1\.", r"encoder.layers.\1.attention_norm."),
        (r"gnn\.(\d+)\.ln2\.", r"encoder.layers.\1.feed_forward_norm."),
        (r"gnn\.(\d+)\.attn\.to_qkv\.", r"encoder.layers.\1.query_key_value."),
        (r"gnn\.(\d+)\.attn\.to_out\.0\.", r"encoder.layers.\1.attention_output."),
        (r"gnn\.(\d+)\.ff\.net\.0\.", r"encoder.layers.\1.expand."),
        (r"gnn\.(\d+)\.ff\.net\.3\.", r"encoder.layers.\1.contract."),
        (r"gnn\.mlp\.fc\.", r"encoder.direct_message."),
        (r"gnn\.mlp_ve\.fc\.", r"encoder.virtual_message."),
        (r"gnn\.gru\.", r"encoder.update."),
        (r"decoder\.fc\.0\.", r"decoder.grid."),
        (r"decoder\.conv\.0\.", r"decoder.hidden."),
        (r"decoder\.conv\.2\.", r"decoder.output."),
        (r"decoder\.class_layer_predictor\.1\.", r"decoder.class_output."),
        (r"decoder_1d\.fc\.0\.", r"decoder.vectors.hidden."),
        (r"decoder_1d\.fc\.2\.", r"decoder.vectors.output."),
        (r"bias_class\.1\.", r"decoder.vectors.class_bias."),
    )
)


def import_checkpoint(source: Path, destination: Path, *, dataset: str = "") -> CheckpointSummary:
    """Converts a published hypernetwork; no pickled code is run.

    Args:
        source: A ``.pt`` file (torch or joblib), or ``.safetensors`` with a ``.config.json`` beside it.
        destination: The checkpoint to write, ``.safetensors``.
        dataset: Data that it was trained on, for its card; "" if unknown.

    Returns:
        What was written.

    Raises:
        CheckpointError: The source is damaged or of another kind, or the destination cannot be written.
    """
    if not source.is_file():
        raise CheckpointError(f"there is no file {source.name!r} to import")
    tensors, declared = _read_safetensors(source) if source.suffix == ".safetensors" else _read_pickled(source)
    tensors = _normalized(tensors)
    config = _infer_config(tensors, declared, source=source.name)
    renamed = {_our_name(name, source.name): tensor for name, tensor in tensors.items()}
    ghn = build_ghn(config, renamed, source=source.name)
    for name, tensor in ghn.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{source.name!r}: tensor {name!r} has values that are not finite")
    return save_checkpoint(ghn, destination, card=ModelCard(dataset, trained_on=f"imported from {source.name}"))


def _infer_config(tensors: Mapping[str, Tensor], declared: Mapping[str, Any], *, source: str) -> GHNConfig:
    """The configuration of a published state dict, from the shapes of its tensors.

    Args:
        tensors: State dict with official names, decoders as matrices.
        declared: Configuration that came with it, with official keys; it decides what shapes do not tell, and must not
            contradict them.
        source: What to call its origin in messages.

    Raises:
        CheckpointError: This is no GHN-2 or GHN-3, or ``declared`` says otherwise.
    """
    is_ghn2 = "gnn.gru.weight_ih" in tensors
    if not is_ghn2 and "gnn.0.attn.to_qkv.weight" not in tensors:
        raise CheckpointError(
            f"{source!r} is no GHN-2 or GHN-3: it has neither a gated unit (gnn.gru) nor attention (gnn.0.attn). "
            f"Its first tensors are {sorted(tensors)[:5]}"
        )
    channels = _shape(tensors, "embed.weight", 2, source)[1]
    max_out = _shape(tensors, "decoder.class_layer_predictor.1.weight", 2, source)[1]
    side = math.isqrt(_shape(tensors, "decoder.fc.0.weight", 2, source)[0] // (4 * channels))
    has_norm = "ln.weight" in tensors
    has_virtual_edges = bool(declared.get("ve", True)) if not is_ghn2 else "gnn.mlp_ve.fc.0.weight" in tensors
    if len(tensors["embed.weight"]) != len(PUBLISHED_OP_TYPES):
        raise CheckpointError(
            f"{source!r} has {len(tensors['embed.weight'])} node types; published ones have {len(PUBLISHED_OP_TYPES)}"
        )
    config = GHNConfig(
        encoder="gated_gnn" if is_ghn2 else "graphormer",
        hidden_channels=channels,
        num_layers=1 if is_ghn2 else sum(name.endswith("ln1.weight") for name in tensors),
        num_heads=1 if is_ghn2 else _shape(tensors, "gnn.0.attn.proj_e.2.weight", 2, source)[0],
        max_shape=(max_out, _shape(tensors, "decoder.conv.2.weight", 2, source)[0] // max_out, side, side),
        num_classes=_shape(tensors, "decoder.class_layer_predictor.1.weight", 2, source)[0],
        weight_norm=bool(declared.get("weight_norm", has_norm)),
        layer_norm=has_norm,
        distance_cutoff=VIRTUAL_EDGE_CUTOFF if has_virtual_edges else 1,
        kernel_crop="corner" if is_ghn2 else "center",
        op_types=PUBLISHED_OP_TYPES,
    )
    _check_declared(config, declared, source)
    return config


def _check_declared(config: GHNConfig, declared: Mapping[str, Any], source: str) -> None:
    """Compares what a configuration says with what the shapes say."""
    found: dict[str, object] = {
        "hid": config.hidden_channels,
        "num_classes": config.num_classes,
        "max_shape": list(config.max_shape),
        "layernorm": config.layer_norm,
    }
    if config.encoder == "graphormer":
        found |= {"layers": config.num_layers, "heads": config.num_heads}
    for key, value in found.items():
        said = declared.get(key, value)
        said = list(said) if isinstance(said, tuple) else said
        if said != value:
            raise CheckpointError(
                f"{source!r}: its configuration says {key}={said!r}, but its tensors say {key}={value!r}"
            )


def _read_safetensors(source: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    beside = source.with_suffix(".config.json")
    try:
        document = json.loads(beside.read_text(encoding="utf-8"))
        tensors = load_file(source)
    except OSError as error:
        raise CheckpointError(
            f"cannot read {source.name!r} or its configuration {beside.name!r}: {error.strerror or error}; a file of "
            "ours needs no import"
        ) from error
    except (ValueError, SafetensorError) as error:
        raise CheckpointError(f"{source.name!r} or {beside.name!r} is damaged: {error}") from error
    declared = document.get("config", document) if isinstance(document, dict) else None
    if not isinstance(declared, dict):
        raise CheckpointError(f"{beside.name!r} holds no configuration; expected an object with the key 'config'")
    return tensors, declared


def _read_pickled(path: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """The state dict and, if there is one, the configuration in a pickled file.

    Raises:
        CheckpointError: The file is damaged, of another kind, or asks for code to be run.
    """
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise CheckpointError(f"cannot read {path.name!r}: {error.strerror}") from error
    for magic, kind in _COMPRESSED_STARTS.items():
        if start.startswith(magic):
            raise CheckpointError(f"{path.name!r} is compressed ({kind}); save it again without compression")
    try:
        if start.startswith((_ZIP_START, _TORCH_LEGACY_MAGIC)):
            # Training scripts keep their command line in the file.
            with torch.serialization.safe_globals([argparse.Namespace]):
                loaded: object = torch.load(path, map_location="cpu", weights_only=True)
        elif start.startswith(_PICKLE_START):
            with path.open("rb") as file:
                loaded = _TensorUnpickler(file).load()
        else:
            raise CheckpointError(
                f"{path.name!r} is no checkpoint of a known kind; expected a file of torch.save, a joblib dump of a "
                f"state dict, or safetensors with a .config.json beside it (it starts with {start[:8]!r})"
            )
        return _state_dict(loaded, path.name)
    except _DAMAGED as error:
        asked_for = re.search(r"GLOBAL ([\w.]+)", str(error))  # the rest of torch's text tells how to run it
        reason = f"it asks for {asked_for[1]}" if asked_for else type(error).__name__
        raise CheckpointError(
            f"{path.name!r} is damaged, or holds more than tensors and plain values; nothing in it was run: {reason}"
        ) from error


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


def _normalized(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix of data-parallel training, and with 1x1 convolutions as matrices."""
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return {
        name: tensor.flatten(1) if tensor.dim() == 4 and tensor.shape[2:] == (1, 1) else tensor
        for name, tensor in tensors.items()
    }


def _our_name(name: str, source: str) -> str:
    for official, ours in _RENAMES:
        match = official.match(name)
        if match:
            return match.expand(ours) + name[match.end() :]
    raise CheckpointError(f"{source!r}: no GHN-2 or GHN-3 has a tensor {name!r}")


def _shape(tensors: Mapping[str, Tensor], name: str, rank: int, source: str) -> tuple[int, ...]:
    if name not in tensors or tensors[name].dim() != rank or tensors[name].numel() == 0:
        found = f"shape {tuple(tensors[name].shape)}" if name in tensors else "nothing"
        raise CheckpointError(f"{source!r}: expected a tensor {name!r} with {rank} axes, found {found}")
    return tuple(tensors[name].shape)
