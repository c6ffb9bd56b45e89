"""Imports the client's examples, and public libraries whose own import needs torchvision, beside a build without it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
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


def example(name: str) -> ModuleType:
    """The script ``clients/examples/<name>.py`` as a module."""
    path = Path(__file__).parents[2] / "clients" / "examples" / f"{name}.py"
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # as where it is run: examples share ``common``
    specification = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
