"""Networks by name: ``timm:NAME``, or what a function of a script makes; and what such a network is called with."""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import inspect
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ghn_client.errors import InvalidArchitectureError, InvalidOptionError, MissingExtraError
from ghn_client.onnx.export import declared_inputs
from ghn_client.options import parse_pairs

FORMS = "MODEL.onnx, timm:NAME, SCRIPT.py:FACTORY or package.module:FACTORY"
DEFAULT_IMAGE_SIZE = 32
TIMM = "timm:"


def find_network(text: str, *, pretrained: bool = False) -> nn.Module | Path:
    """The network that ``text`` names: a module, or the path of an ONNX file.

    Args:
        text: The path of a file; ``timm:NAME``, perhaps with options (``timm:resnet18,num_classes=10``);
            ``SCRIPT.py:FACTORY``, whose folder becomes importable as if the script were run; or
            ``package.module:FACTORY``. A factory is a function or class that is called without arguments, or a module.
        pretrained: Whether networks of timm come with trained weights, which timm downloads.

    Raises:
        InvalidOptionError: The name has another form, or what it names cannot be found or made.
        InvalidArchitectureError: There is no such file.
        MissingExtraError: timm is not installed.
    """
    path = Path(text)
    if path.is_file() and path.suffix != ".py":
        return path
    if text.startswith(TIMM):
        return _from_timm(text.removeprefix(TIMM), pretrained=pretrained)
    if path.suffix == ".py":
        names = _factories(path) if path.is_file() else []
        advice = f"; it defines {', '.join(names)}: say {text}:{names[0]}" if names else ""
        raise InvalidOptionError(f"expected {FORMS}, got the script {text!r} without a function{advice}")
    script, separator, factory = text.rpartition(":")
    if separator and script and factory:
        return _call_factory(text, _import_script(script), factory)
    if path.suffix == ".onnx":
        raise InvalidArchitectureError(f"there is no file {text!r}; expected {FORMS}")
    raise InvalidOptionError(f"expected {FORMS}, {text!r} is none of them")


def image_example(network: nn.Module, image_size: int | None = None) -> Any:
    """What ``network`` is called with: what it declares, or an image as its first convolution takes it.

    Args:
        network: Any module; of those that declare no inputs, one that takes square images.
        image_size: Pixels per side, whatever is declared; None for what is declared, else 32.
    """
    declared = declared_inputs(network)
    if declared is not None and image_size is None:
        return declared
    size = image_size or DEFAULT_IMAGE_SIZE
    channels = next((part.in_channels for part in network.modules() if isinstance(part, nn.Conv2d)), 3)
    image = torch.zeros(1, channels, size, size)
    # a network of transformers is called by keyword
    return {"pixel_values": image} if getattr(network, "main_input_name", "") == "pixel_values" else image


def file_stem(text: str) -> str:
    """A name for files about the network that ``text`` names: that of its file, its factory, or its name in timm."""
    if text.startswith(TIMM):
        return text.removeprefix(TIMM).partition(",")[0].replace("/", "_")
    return Path(text).stem if Path(text).is_file() else text.rpartition(":")[2]


def _from_timm(text: str, *, pretrained: bool) -> nn.Module:
    name, *pairs = text.split(",")
    options: dict[str, Any] = {"pretrained": pretrained}
    for key, value in parse_pairs(pairs, "timm:NAME,KEY=VALUE").items():
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = {"True": True, "False": False, "None": None}.get(value, value)
    try:
        timm: Any = importlib.import_module("timm")
    except Exception as error:  # timm imports torchvision, which fails in its own ways beside another build of torch
        raise MissingExtraError(
            f"{TIMM}{name} needs the libraries timm and torchvision, in builds that fit the installed torch "
            f"(pip install timm): {_reason(error)}"
        ) from error
    try:
        network: nn.Module = timm.create_model(name, **options)
    except Exception as error:  # whatever a constructor of theirs raises
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        known = f"; close names are {', '.join(near)}" if near and name not in near else ""
        raise InvalidOptionError(f"timm cannot make {text!r}: {_reason(error)}{known}") from error
    return network


def _import_script(script: str) -> ModuleType:
    """The module in a file or of a dotted name; imports find what lies beside the file, or in the present folder."""
    path = Path(script)
    is_file = path.suffix == ".py"
    folder = str(path.resolve().parent) if is_file else os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    if is_file and not path.is_file():
        raise InvalidOptionError(f"there is no script {script!r}")
    try:
        if not is_file:
            return importlib.import_module(script)
        name = path.stem if path.stem not in sys.modules else f"{path.stem}_script"
        specification = importlib.util.spec_from_file_location(name, path)
        assert specification is not None
        assert specification.loader is not None
        module = importlib.util.module_from_spec(specification)
        sys.modules[name] = module  # dataclasses and pickles look their module up
        specification.loader.exec_module(module)
        return module
    except Exception as error:  # whatever the user's code raises
        raise InvalidOptionError(f"cannot import {script!r}: {_reason(error)}") from error


def _call_factory(text: str, script: ModuleType, factory: str) -> nn.Module:
    made = getattr(script, factory, None)
    if made is None:
        source = Path(script.__file__ or "")
        names = _factories(source) if source.suffix == ".py" else []
        raise InvalidOptionError(f"{text!r}: there is no {factory!r}; it defines {', '.join(names) or 'no function'}")
    if not isinstance(made, nn.Module) and callable(made):
        needed = _required_arguments(made)
        if needed:
            raise InvalidOptionError(
                f"{text!r} needs the arguments {', '.join(needed)}, and is called without: give them defaults, or name "
                f"a function without arguments that returns {factory}(...)"
            )
        try:
            made = made()
        except Exception as error:  # whatever the user's code raises
            raise InvalidOptionError(f"{text!r} failed: {_reason(error)}") from error
    if not isinstance(made, nn.Module):
        raise InvalidOptionError(f"expected {text!r} to give a torch module, got a {type(made).__name__}")
    return made


def _required_arguments(function: Any) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some builtins do not say
        return []
    named = [item for item in parameters if item.kind not in (item.VAR_POSITIONAL, item.VAR_KEYWORD)]
    return [item.name for item in named if item.default is item.empty]


def _factories(path: Path) -> list[str]:
    """Public functions and classes of a script, without running it."""
    try:
        body = ast.parse(path.read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return []
    defined = [node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return [name for name in defined if not name.startswith("_")]


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
