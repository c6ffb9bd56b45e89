"""Imports public libraries whose own import needs torchvision, beside a build of torch without its operators."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest
import torch

_KEPT = []


def public_library(name: str) -> ModuleType:
    """The module ``name``; skips the calling test where it is not installed or does not load."""
    _declare_torchvision_operators()
    try:
        return importlib.import_module(name)
    except Exception as error:  # a foreign import may fail in any way
        pytest.skip(f"{name} does not load here: {type(error).__name__}: {error}")


def _declare_torchvision_operators() -> None:
    """Defines the two schemas that a torchvision of another build lacks, only where the plain import fails."""
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        return
    except RuntimeError:
        for loaded in [module for module in sys.modules if module.split(".")[0] == "torchvision"]:
            del sys.modules[loaded]
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)
