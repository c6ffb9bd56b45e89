"""Deltas: files of a few kilobytes with what was tuned, bound to the base that they belong to.

A delta is a safetensors file. Tensors are named ``<part>/<path>``; the metadata says which strategies with which
options made the parts, and what the base is:

- ``weights``: the SHA-256 of all base values that the delta does not replace;
- ``request``: the request that regenerates them. "Architecture + GHN + seed + gammas" is then a complete model.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from ghn_client.atomic_file import write_file
from ghn_client.errors import FileError, GhnClientError, LoadError
from ghn_client.finetune.handle import FineTuneHandle, combine
from ghn_client.finetune.inserted_norms import CHILD
from ghn_client.finetune.strategies import prepare

FORMAT, VERSION = "ghn-delta", "1"
_PATHS = {"head", "layers", "after", "rank", "alpha"}  # options that name layers
_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class DeltaInfo:
    """What a delta file says about itself."""

    parts: tuple[tuple[str, dict[str, Any]], ...]  # strategy name and options of every part, in order
    digest: str  # SHA-256 of the base values
    replaced: tuple[str, ...]  # names in the base whose values the delta replaces; they are not in the digest
    request: dict[str, Any] | None  # the request that regenerates the base, or ``None``


def base_digest(module: nn.Module, *, without: Collection[str] = ()) -> str:
    """SHA-256 of the names, types, shapes and values of a module's parameters and buffers, ``without`` some names.

    What strategies add to a module (inserted norm layers, low-rank updates) and BatchNorm's batch counters
    are not part of it, so that it is the same before and after preparation; nor are the names that ``torch.compile``
    and ``DataParallel`` put in front.
    """
    digest, values = hashlib.sha256(), _base_values(module)
    for name in sorted(set(values) - set(without)):
        value = values[name].detach().cpu().contiguous()
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()


def replaced_names(handle: FineTuneHandle) -> list[str]:
    """Names of the base values that ``handle`` tunes, under which :func:`base_digest` leaves them out."""
    tuned = {id(value) for part in handle.parts for value in part.named_parameters().values()}
    tuned |= {id(part.module.get_buffer(name)) for part in handle.parts for name in part.buffers}
    return sorted(name for name, value in _base_values(handle.base).items() if id(value) in tuned)


def save_delta(handle: FineTuneHandle, path: str | Path, *, request: Mapping[str, Any] | None = None) -> int:
    """Writes what ``handle`` tuned, and returns the number of bytes.

    Args:
        handle: An open handle in the enabled state.
        path: File to write.
        request: What regenerates the base (architecture digest, GHN, options, seed), as JSON types; without it the
            delta is bound to the values of the base.

    Raises:
        FileError: It cannot be written.
        InvalidOptionError: The handle is disabled, or was merged or restored.
    """
    handle.require_enabled()
    tensors = {
        f"{index}/{_plain(part.module, name)}": value.cpu().contiguous().clone()
        for index, part in enumerate(handle.parts)
        for name, value in part.state().items()
    }
    parts = [[part.strategy, _renamed(part.config, _plain_names(part.module))] for part in handle.parts]
    replaced = replaced_names(handle)
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "parts": json.dumps(parts),
        "base": "weights" if request is None else "request",
        "digest": base_digest(handle.base, without=replaced),
        "replaced": json.dumps(replaced),
        "request": json.dumps(None if request is None else dict(request), sort_keys=True),
    }
    data = save(tensors, metadata)
    write_file(path, data)
    return len(data)


def read_delta(path: str | Path) -> tuple[DeltaInfo, dict[str, torch.Tensor]]:
    """What a delta file says, and its tensors named ``<part>/<path>``.

    Raises:
        FileError: The file cannot be read, is no delta, or of a newer version.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        kind = (metadata.get("format"), metadata.get("version"))
        if kind != (FORMAT, VERSION):
            raise ValueError(f"expected {FORMAT} of version {VERSION}, got {kind[0]} {kind[1]}")
        info = DeltaInfo(
            parts=tuple((name, config) for name, config in json.loads(metadata["parts"])),
            digest=metadata["digest"],
            replaced=tuple(json.loads(metadata["replaced"])),
            request=json.loads(metadata["request"]),
        )
    except (OSError, KeyError, ValueError, TypeError, SafetensorError) as error:
        raise FileError(f"{Path(path).name} is no delta file: {error}") from error
    return info, tensors


def load_delta(module: nn.Module, path: str | Path, *, request: Mapping[str, Any] | None = None) -> FineTuneHandle:
    """Applies a delta to its base.

    Args:
        module: The base, as it was before tuning. A refused delta leaves it unchanged.
        path: File of :func:`save_delta`.
        request: What this base was regenerated from; needed for deltas that are bound to a request and whose digest
            does not fit (another machine may round a prediction differently).

    Returns:
        A handle: ``handle.module`` is the tuned module, ``disabled()`` gives the base, ``merge()`` makes it permanent.

    Raises:
        LoadError: The delta belongs to other weights or to another request, or its tensors do not fit.
        FileError: The file is no delta.
    """
    info, tensors = read_delta(path)
    _check_base(module, info, request)
    handles: list[FineTuneHandle] = []
    current = module
    try:
        for index, (strategy, config) in enumerate(info.parts):
            names = {plain: name for name, plain in _plain_names(current).items()}
            handles.append(prepare(current, strategy, **_renamed(config, names)))
            current = handles[-1].module
            _fill(handles[-1], tensors, index)
    except (GhnClientError, TypeError, AttributeError) as error:
        for handle in reversed(handles):
            handle.restore()
        raise LoadError(f"{Path(path).name} does not fit this module: {error}") from error
    return combine(*handles)


def load_complete_model(
    module: nn.Module, path: str | Path, predict: Callable[[dict[str, Any]], Mapping[str, torch.Tensor]]
) -> FineTuneHandle:
    """Regenerates the base from the request in a delta, loads it into ``module`` and applies the delta.

    Args:
        module: A module of the right architecture; its values are replaced.
        path: A delta that is bound to a request.
        predict: Turns the request into tensors by state-dict name, usually by asking a server.

    Raises:
        FileError: The delta holds no request.
        LoadError: The prediction does not fit the module, or see :func:`load_delta`.
    """
    info, _ = read_delta(path)
    if info.request is None:
        raise FileError(f"{Path(path).name} is bound to weights, not to a request; load them and use load_delta")
    missing, unexpected = module.load_state_dict(dict(predict(info.request)), strict=False)
    learned = {name for name, _ in module.named_parameters()}
    if unexpected or learned & set(missing):
        raise LoadError(
            f"the prediction does not fit the module: missing {sorted(learned & set(missing))[:5]}, unexpected"
            f" {unexpected[:5]}"
        )
    return load_delta(module, path, request=info.request)


def _check_base(module: nn.Module, info: DeltaInfo, request: Mapping[str, Any] | None) -> None:
    actual = base_digest(module, without=info.replaced)
    if actual == info.digest:
        return
    if info.request is not None and request is not None:
        if json.dumps(dict(request), sort_keys=True) != json.dumps(info.request, sort_keys=True):
            raise LoadError(f"the delta belongs to the request {info.request}, this base came from {dict(request)}")
        _LOG.warning(
            "the base was regenerated from the same request but differs in rounding from the one that was tuned"
        )
        return
    raise LoadError(
        f"the delta belongs to base weights with digest {info.digest[:16]}..., this module has {actual[:16]}...;"
        " load the weights that were tuned"
        + (f", or regenerate them from the request {info.request}" if info.request is not None else "")
    )


def _base_values(module: nn.Module) -> dict[str, torch.Tensor]:
    """Values of a module without what strategies add; tied ones have all their names, as in its state dict."""
    return {
        _plain(module, name).replace(".parametrizations.weight.original", ".weight"): value
        for name, value in module.state_dict(keep_vars=True).items()
        if _belongs_to_base(name) and isinstance(value, torch.Tensor)
    }


def _belongs_to_base(name: str) -> bool:
    pieces = name.split(".")
    return not (CHILD in pieces or ".parametrizations.weight.0." in name or pieces[-1] == "num_batches_tracked")


def _plain(module: nn.Module, path: str) -> str:
    """A dotted path of ``module`` without the pieces that ``torch.compile`` and ``DataParallel`` put in."""
    kept: list[str] = []
    owner: Any = module
    for piece in path.split("."):
        if piece != "_orig_mod" and not (piece == "module" and isinstance(owner, _PARALLEL)):
            kept.append(piece)
        owner = getattr(owner, "_modules", {}).get(piece)
    return ".".join(kept)


def _plain_names(module: nn.Module) -> dict[str, str]:
    return {name: _plain(module, name) for name, _ in module.named_modules()}


def _renamed(config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Options of a strategy with the new ``names`` of layers."""
    renamed = dict(config)
    for key in _PATHS & config.keys():
        if isinstance(value := config[key], str):
            renamed[key] = names.get(value, value)
        elif isinstance(value, Mapping):
            renamed[key] = {names.get(path, path): item for path, item in value.items()}
        elif isinstance(value, Sequence):
            renamed[key] = [names.get(path, path) for path in value]
    return renamed


@torch.no_grad()
def _fill(handle: FineTuneHandle, tensors: Mapping[str, torch.Tensor], index: int) -> None:
    part = handle.parts[0]
    own = {name.partition("/")[2]: value for name, value in tensors.items() if name.partition("/")[0] == str(index)}
    state = {_plain(part.module, name): value for name, value in part.state().items()}
    if set(own) != set(state):
        odd = sorted(set(own) ^ set(state))[:5]
        raise LoadError(f"part {index} ({part.strategy}) tunes other tensors than the file holds; differing: {odd}")
    for name, value in own.items():
        if value.shape != state[name].shape:
            raise LoadError(f"{name!r} has shape {tuple(value.shape)}, expected {tuple(state[name].shape)}")
        state[name].copy_(value)
