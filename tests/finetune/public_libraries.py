"""Imports public libraries whose own import needs torchvision, beside a build of torch without its operators."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest

from tests.zoo_support import declare_torchvision_operators


def public_library(name: str) -> ModuleType:
    """The module ``name``; skips the calling test where it is not installed or does not load."""
    declare_torchvision_operators()
    try:
        return importlib.import_module(name)
    except Exception as error:  # a foreign import may fail in any way
        pytest.skip(f"{name} does not load here: {type(error).__name__}: {error}")
