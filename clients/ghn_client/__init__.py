"""Client of ghn-service: a network's architecture in, predicted starting weights out.

``GHNClient`` talks to a server, ``export_architecture`` turns a torch module into what a server is sent, and
``Prediction`` puts the reply into a module or a file.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ghn_client.batchnorm import recalibrate_batchnorm
    from ghn_client.client import GHNClient
    from ghn_client.info import Trust
    from ghn_client.initialization import InitializeReport, initialize
    from ghn_client.least_squares import refit
    from ghn_client.loading import LoadReport, load_parameters
    from ghn_client.onnx.export import export_architecture
    from ghn_client.onnx.strip import strip_weights
    from ghn_client.onnx.torch_module import merge_onnx
    from ghn_client.options import LowRankOptions, Step
    from ghn_client.prediction import Prediction
    from ghn_client.sources import Source

_HOMES = {
    "GHNClient": "client",
    "InitializeReport": "initialization",
    "LoadReport": "loading",
    "LowRankOptions": "options",
    "Prediction": "prediction",
    "Source": "sources",
    "Step": "options",
    "Trust": "info",
    "export_architecture": "onnx.export",
    "initialize": "initialization",
    "load_parameters": "loading",
    "merge_onnx": "onnx.torch_module",
    "recalibrate_batchnorm": "batchnorm",
    "refit": "least_squares",
    "strip_weights": "onnx.strip",
}

__all__ = [
    "GHNClient",
    "InitializeReport",
    "LoadReport",
    "LowRankOptions",
    "Prediction",
    "Source",
    "Step",
    "Trust",
    "__version__",
    "export_architecture",
    "initialize",
    "load_parameters",
    "merge_onnx",
    "recalibrate_batchnorm",
    "refit",
    "strip_weights",
]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, so that the protocol can be imported without torch."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"ghn_client.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
