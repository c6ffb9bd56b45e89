"""Sources: trained networks whose weights a prediction takes wherever they fit, from wherever users have them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ghn_client.errors import FileError, GhnClientError, InvalidOptionError, SourceError, listed, require_known
from ghn_client.networks import file_stem, find_network
from ghn_client.onnx.edit import parse_onnx, read_model, tensors_of
from ghn_client.onnx.export import Architecture, ModelSource, declared_inputs, read_source
from ghn_client.onnx.strip import BUFFERS_KEY, PARAMETERS_KEY, strip_weights
from ghn_client.onnx.torch_module import input_shape
from ghn_client.wire import ghn_pb2
from ghn_client.wire.codec import enum_names

AUTO = "auto"
CLASS_LAYERS = (AUTO, *enum_names(ghn_pb2.ClassLayer))
WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Keys under which training scripts keep the state dict of a network."""
PREFIXES = ("module.", "_orig_mod.")
"""What data parallelism and ``torch.compile`` put before every name."""
_FILES = (".onnx", ".safetensors", ".pt", ".pth", ".bin")


@dataclass(frozen=True, eq=False, slots=True)
class Source:
    """A trained network to take weights from, and how.

    Attributes:
        network: A torch module; an ONNX file or its bytes; a file that ``ghn-server add-source`` wrote; ``timm:NAME``
            or ``SCRIPT:FACTORY``; a name in the server's library; or ``auto``, for the one of them that fits best.
        example_inputs: What a module is called with; None for what the target is called with.
        weights: Where ``network`` is without trained weights: its state dict, or the file of one (``.safetensors``,
            ``.pt``).
        name: What it is called in origins; "" for the name of its file or class.
        class_layer: ``auto`` keeps the class layer where there are equally many classes, ``keep`` insists on that, and
            ``reset`` leaves it to the hypernetwork.
        post_process: Whether post-processing changes what the source gives; else predicted tensors alone.
    """

    network: nn.Module | str | Path | bytes
    example_inputs: Any = None
    weights: Mapping[str, torch.Tensor] | str | Path | None = None
    name: str = ""
    class_layer: Literal["auto", "keep", "reset"] = "auto"
    post_process: bool = False

    def __post_init__(self) -> None:
        require_known(self.class_layer, CLASS_LAYERS, field="source.class_layer")


SourceLike = Source | nn.Module | str | Path | bytes | tuple[Any, Any]
"""A ``Source``, its network alone, or a pair of network and weights."""


@dataclass(frozen=True, eq=False, slots=True)
class LocalSource:
    """A source of this machine: either ``path``, a file with everything, or the rest.

    Attributes:
        name: What it is called.
        path: A file that ``ghn-server add-source`` wrote.
        structure: The ONNX model without weights.
        tensors: Weights and running statistics by name in the structure.
        card: What is known of it; the fields are those of ``SourceCard`` of ghn-service.
    """

    name: str
    path: Path | None = None
    structure: bytes = field(default=b"", repr=False)
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)
    card: Mapping[str, Any] = field(default_factory=dict)


def as_source(source: SourceLike) -> Source:
    """The ``Source`` that a user means."""
    if isinstance(source, Source):
        return source
    if isinstance(source, tuple):
        if len(source) != 2:
            raise InvalidOptionError(f"expected (network, weights), got {len(source)} values", field="source")
        return Source(source[0], weights=source[1])
    return Source(source)


def is_in_library(source: Source) -> bool:
    """Whether this names a source of the server's library, rather than a network of this machine.

    Raises:
        InvalidOptionError: It names a file that is not there, or a source of the library with weights of its own.
    """
    text = source.network
    if not isinstance(text, str) or (text != AUTO and Path(text).is_file()) or ":" in text:
        return False
    if Path(text).suffix in _FILES:
        raise InvalidOptionError(f"there is no file {text!r} to take weights from", field="source")
    if source.weights is not None:
        raise InvalidOptionError(
            f"{text!r} names a source of the server's library, which has weights; give the network's file with them",
            field="source",
        )
    return True


def example_of(target: Architecture, example_inputs: Any) -> Any:
    """What a target is called with, as far as it is told: by the user, by the module, or by the file's only input."""
    if example_inputs is not None:
        return example_inputs
    if isinstance(target, nn.Module):
        return declared_inputs(target)
    try:
        model = parse_onnx(bytes(target) if isinstance(target, bytes) else Path(target).read_bytes())
        lists = (item.value for item in model.metadata_props if item.key in (PARAMETERS_KEY, BUFFERS_KEY))
        weights = {str(name) for text in lists for name in json.loads(text)}  # inputs of a file without weights
        for info in [info for info in model.graph.input if info.name in weights]:
            model.graph.input.remove(info)
        return torch.zeros([size or 1 for size in input_shape(model)])
    except (
        OSError,
        ValueError,
        TypeError,
        GhnClientError,
    ):  # several inputs; a source that declares its own needs none of this
        return None


def read_local(source: Source, example_inputs: Any = None) -> LocalSource:
    """Structure and weights of a network of this machine; what a module holds is shared, not copied.

    Args:
        source: What is no name of a library.
        example_inputs: What a module is called with that does not say.

    Raises:
        SourceError: It has no weights, or they do not fit it.
        FileError: The file of its weights cannot be read.
        InvalidArchitectureError: It is no ONNX model.
        ExportError: It is a module that cannot be exported.
        InvalidOptionError: There is no such network.
    """
    network, name = source.network, source.name
    if isinstance(network, str):
        name = name or file_stem(network)
        network = find_network(network, pretrained=source.weights is None)
    if isinstance(network, nn.Module):
        own = source.example_inputs
        if own is None and isinstance(source.network, str):
            own = declared_inputs(network)
        example = own if own is not None else example_inputs
        return _read_module(network, name or type(network).__name__, source.weights, example)
    if isinstance(network, Path) and network.suffix == ".safetensors" and source.weights is None:
        return LocalSource(name or network.stem, path=network)
    name = name or (network.stem if isinstance(network, Path) else "source")
    return _read_onnx(network, name, source.weights)


def _read_module(network: nn.Module, name: str, weights: Any, example_inputs: Any) -> LocalSource:
    """A module's structure and state."""
    exported: ModelSource = read_source(network, example_inputs)
    state = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    if weights is not None:
        state = {**state, **_fitting(network, name, _read_state(weights))}
    tensors = {**exported.values, **state}
    if any(tensor.is_meta for tensor in tensors.values()):
        raise SourceError(f"the source {name!r} has no weights: it is on the meta device", field="source")
    return _checked(LocalSource(name, None, exported.structure, _on_cpu(tensors), _card(network)))


def _fitting(network: nn.Module, name: str, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The values of a state dict under the first name of each tensor of ``network``, whichever of its names they have.

    Raises:
        SourceError: One is missing, or of another shape.
    """
    names: dict[int, list[str]] = {}
    own = network.state_dict(keep_vars=True)
    for key, value in own.items():
        names.setdefault(id(value), []).append(key)
    found = {keys[0]: next((given[key] for key in keys if key in given), None) for keys in names.values()}
    odd = [
        f"{key} is {'missing' if value is None else tuple(value.shape)}, expected {tuple(own[key].shape)}"
        for key, value in found.items()
        if own[key].is_floating_point() and (value is None or value.shape != own[key].shape)
    ]
    if odd:
        raise SourceError(
            f"the weights do not fit the source {name!r}: {listed(odd, most=3, separator='; ')}", field="source"
        )
    return {key: value for key, value in found.items() if value is not None}


def _read_onnx(network: Path | bytes, name: str, weights: Any) -> LocalSource:
    """An ONNX file's structure and tensors."""
    if isinstance(network, Path):
        model = read_model(network)
        structure = read_source(network).structure
    else:
        model, structure = parse_onnx(bytes(network)), strip_weights(bytes(network))
    tensors = tensors_of(model)
    if weights is not None:
        tensors |= _on_cpu(_read_state(weights))
    return _checked(LocalSource(name, None, structure, tensors))


def _read_state(weights: Mapping[str, torch.Tensor] | str | Path) -> dict[str, torch.Tensor]:
    """A state dict, or that in a file; no pickled code is run."""
    if not isinstance(weights, Mapping):
        path = Path(weights)
        try:
            if path.suffix == ".safetensors":
                weights = load_file(path)
            else:
                weights = torch.load(path, map_location="cpu", weights_only=True)
        except OSError as error:
            raise FileError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
        except (SafetensorError, RuntimeError, ValueError, EOFError, KeyError, AttributeError) as error:
            raise FileError(f"{str(path)!r} is no file of weights: {error}") from error
        except Exception as error:  # pickle's own, whose class is private in places
            raise FileError(f"{str(path)!r} has more than weights, or is damaged: {type(error).__name__}") from error
    found: Any = weights
    while isinstance(found, Mapping) and (inner := next((key for key in WRAPPERS if _is_state(found.get(key))), "")):
        found = found[inner]
    if not _is_state(found):
        raise SourceError("expected weights as tensors by name, as a state dict is", field="source")
    state = {str(key): value for key, value in found.items() if isinstance(value, torch.Tensor)}
    while prefix := next((each for each in PREFIXES if state and all(key.startswith(each) for key in state)), ""):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(item, torch.Tensor) for item in value.values())


def _on_cpu(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What has floating-point values, detached and on the CPU; quantised tensors have none."""
    return {name: value.detach().cpu() for name, value in tensors.items() if value.is_floating_point()}


def _checked(source: LocalSource) -> LocalSource:
    """The source itself.

    Raises:
        SourceError: It has no weights.
    """
    if not any(tensor.dim() > 1 for tensor in source.tensors.values()):
        raise SourceError(
            f"the source {source.name!r} has no floating-point weights: give them beside it, as (network, weights); "
            "where they lie beside a file, give its path; quantised networks are no sources",
            field="source",
        )
    return source


def _card(network: nn.Module) -> dict[str, Any]:
    """What a network of timm says about itself."""
    described = getattr(network, "pretrained_cfg", None)
    if not isinstance(described, Mapping):
        return {}
    normalization = {key: tuple(described[key]) for key in ("mean", "std") if described.get(key)}
    size = described.get("input_size") or (0, 0, 0)
    return {"normalization": normalization, "image_size": int(size[-1]), "licence": str(described.get("license") or "")}
