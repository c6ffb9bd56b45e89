"""To and from the adapter format of PEFT, where it has the same thing: LN tuning (``norm_only``) and LoRA.

An adapter is a folder with ``adapter_config.json`` and ``adapter_model.safetensors``. Classifiers that are tuned along
become PEFT's ``modules_to_save``. The tests load these folders with the real library.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from ghn_client.atomic_file import write_file
from ghn_client.batchnorm import KEEP, UPDATE
from ghn_client.errors import FileError, InvalidOptionError, LoadError, UnsupportedModuleError
from ghn_client.finetune.handle import FineTuneHandle, Part
from ghn_client.finetune.lora import low_rank_update
from ghn_client.finetune.norm_only import norm_only

LN_TUNING, LORA = "LN_TUNING", "LORA"
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
#: What follows the name of a layer in the names of its tuned tensors.
_MARKERS = {LN_TUNING: ".ln_tuning_layers.", LORA: ".lora_"}
_PREFIX = "base_model.model."
_UPDATE = ".parametrizations.weight.0."


def export_peft(handle: FineTuneHandle, folder: str | Path) -> Path:
    """Writes the tuned part of a handle of ``norm_only`` (without inserted layers) or ``low_rank_update`` for PEFT.

    Raises:
        UnsupportedModuleError: PEFT has no adapter for this strategy.
        InvalidOptionError: The handle is disabled, or was merged or restored.
    """
    handle.require_enabled()
    if len(handle.parts) != 1 or handle.parts[0].strategy not in ("norm_only", "low_rank_update"):
        raise UnsupportedModuleError(
            f"PEFT has adapters for norm_only (LN tuning) and low_rank_update (LoRA), not for {handle.strategy};"
            " use save_delta"
        )
    part = handle.parts[0]
    config, tensors = _ln_tuning(part) if part.strategy == "norm_only" else _lora(part)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    write_file(target / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True) + "\n")
    contiguous = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    write_file(target / WEIGHTS_FILE, save(contiguous, {"format": "pt"}))
    return target


@torch.no_grad()
def import_peft(module: nn.Module, folder: str | Path) -> FineTuneHandle:
    """Applies an adapter of LN tuning or LoRA, from PEFT or :func:`export_peft`, to its base, without wrapper modules.

    Raises:
        FileError: The adapter cannot be read, is of another kind, or uses a variant of LoRA.
        LoadError: It does not fit the module.
    """
    source = Path(folder)
    try:
        config = json.loads((source / CONFIG_FILE).read_text())
        tensors = load((source / WEIGHTS_FILE).read_bytes())
    except (OSError, ValueError, SafetensorError) as error:
        raise FileError(f"{source.name} is no adapter of PEFT: {error}") from error
    if not all(name.startswith(_PREFIX) for name in tensors):
        raise FileError(f"expected tensor names that start with {_PREFIX!r}, got {list(tensors)[:3]}")
    own = {name[len(_PREFIX) :]: value for name, value in tensors.items()}
    marker = _MARKERS.get(str(config.get("peft_type")))
    if marker is None:
        raise FileError(f"expected an adapter of kind {' or '.join(_MARKERS)}, got {config.get('peft_type')!r}")
    layers = sorted({name.partition(marker)[0] for name in own if marker in name})
    head = sorted({name.rpartition(".")[0] for name in own if marker not in name})
    if not layers:
        raise FileError("the adapter tunes no layer")
    try:
        if marker == _MARKERS[LN_TUNING]:
            values = {name.replace(marker, "."): value for name, value in own.items()}
            carries_statistics = any(name.endswith("running_mean") for name in values)
            handle = norm_only(module, head=head, statistics=UPDATE if carries_statistics else KEEP)
        else:
            values, options = _from_lora(module, own, config, layers)
            handle = low_rank_update(module, layers=layers, head=head, **options)
    except (InvalidOptionError, AttributeError) as error:
        raise LoadError(f"{source.name} does not fit this module: {error}") from error
    state = handle.parts[0].state()
    for name, value in values.items():
        if name.endswith("num_batches_tracked"):
            continue
        if name not in state or state[name].shape != value.shape:
            handle.restore()
            raise LoadError(f"the adapter's tensor {name!r} {tuple(value.shape)} has no place in this module")
        state[name].copy_(value)
    return handle


def _ln_tuning(part: Part) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    if part.config.get("after"):
        raise UnsupportedModuleError("PEFT tunes norm layers that are there; inserted ones have no PEFT format")
    head = set(part.groups.get("head", ()))
    layers = sorted({name.rpartition(".")[0] for name in part.groups["norm"]})
    tensors = {
        _PREFIX + (name if name in head else _MARKERS[LN_TUNING].join(name.rsplit(".", 1))): value
        for name, value in part.state().items()
    }
    return {**_common(LN_TUNING, part), "target_modules": layers}, tensors


def _lora(part: Part) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, value in part.state().items():
        layer, found, local = name.partition(_UPDATE)
        if not found:
            tensors[_PREFIX + name] = value
            continue
        owner: Any = part.module.get_submodule(layer)
        update = owner.parametrizations.weight[0]
        ranks[layer] = len(update.a) * getattr(owner, "groups", 1)
        alphas[layer] = update.scale * ranks[layer]
        tensors[f"{_PREFIX}{layer}.lora_{local.upper()}.weight"] = _peft_factor(owner, local, value)
    rank, alpha = max(ranks.values()), max(alphas.values())
    config = {
        **_common(LORA, part),
        "target_modules": sorted(ranks),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "rank_pattern": {layer: value for layer, value in ranks.items() if value != rank},
        "alpha_pattern": {layer: value for layer, value in alphas.items() if value != alpha},
    }
    return config, tensors


def _peft_factor(layer: nn.Module, local: str, value: torch.Tensor) -> torch.Tensor:
    """A or B as PEFT keeps it.

    Those of a convolution are convolutions, with the kernel for A and 1 x 1 for B. A of PEFT has no groups: that of a
    grouped convolution becomes block diagonal, with a rank as many times as large.
    """
    weight = layer.get_parameter("parametrizations.weight.original")
    kernel = tuple(weight.shape[2:])
    if not kernel:
        return value
    if any(size != 1 for size in layer.dilation) or layer.padding_mode != "zeros":  # type: ignore[union-attr]
        raise UnsupportedModuleError(
            f"PEFT's LoRA has no dilation and no padding modes of convolutions like {layer}; leave it out of layers="
        )
    if local == "b":
        return value.reshape(*value.shape, *[1] * len(kernel))
    groups = int(getattr(layer, "groups", 1))
    rank, channels = len(value), weight.shape[1]
    result = value.new_zeros(groups, rank, groups, channels, *kernel)
    for group in range(groups):
        result[group, :, group] = value.reshape(rank, channels, *kernel)
    return result.reshape(groups * rank, groups * channels, *kernel)


def _own_factor(layer: nn.Module, local: str, value: torch.Tensor) -> torch.Tensor:
    """A or B of an adapter as ``low_rank_update`` keeps it."""
    if local == "b":
        return value.reshape(len(value), -1)
    groups = int(getattr(layer, "groups", 1))
    blocks = value.reshape(groups, len(value) // groups, groups, -1)
    expected = torch.zeros_like(blocks)
    for group in range(groups):
        expected[group, :, group] = blocks[0, :, 0]
    if not torch.equal(blocks, expected):
        raise FileError(
            f"the adapter's factor A of {layer} mixes the groups of the convolution, or differs between them, which"
            " low_rank_update does not compute"
        )
    return blocks[0, :, 0]


def _common(kind: str, part: Part) -> dict[str, Any]:
    head = sorted({name.rpartition(".")[0] for name in part.groups.get("head", ())})
    return {
        "peft_type": kind,
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "modules_to_save": head or None,
        "revision": None,
    }


def _from_lora(
    module: nn.Module, own: Mapping[str, torch.Tensor], config: Mapping[str, Any], layers: list[str]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Values and options of ``low_rank_update`` for a LoRA adapter."""
    names = ("use_dora", "use_rslora", "use_qalora", "fan_in_fan_out", "lora_bias")
    if variants := [name for name in names if config.get(name)]:
        raise FileError(f"this adapter uses {', '.join(variants)}, which low_rank_update does not compute")

    def per_layer(pattern: str, default: str) -> dict[str, float]:
        chosen = {layer: float((config.get(pattern) or {}).get(layer, config[default])) for layer in layers}
        return {layer: number / getattr(module.get_submodule(layer), "groups", 1) for layer, number in chosen.items()}

    ranks = {layer: int(rank) for layer, rank in per_layer("rank_pattern", "r").items()}
    values = {}
    for name, value in own.items():
        layer, found, rest = name.partition(_MARKERS[LORA])
        local = rest[:1].lower()
        own_name = f"{layer}{_UPDATE}{local}" if found else name
        values[own_name] = _own_factor(module.get_submodule(layer), local, value) if found else value
    return values, {"rank": ranks, "alpha": per_layer("alpha_pattern", "lora_alpha")}
