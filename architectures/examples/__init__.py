"""A few structure-only ONNX files of reference networks, for the README, the tests and first steps.

``python -m architectures.examples`` writes them anew.
"""

from __future__ import annotations

from pathlib import Path

from ghn_service.errors import InvalidOptionError

EXAMPLES: tuple[str, ...] = ("resnet20", "se_mobilenet_mini", "convnext_atto", "vit_mini")


def example_path(name: str) -> Path:
    """The file of the example ``name``.

    Raises:
        InvalidOptionError: There is no such example.
    """
    if name not in EXAMPLES:
        raise InvalidOptionError(f"no example is called {name!r}; known are {', '.join(EXAMPLES)}", field="name")
    return Path(__file__).with_name(f"{name}.onnx")
