"""The house's import directions: who may know whom, and which library lives where."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A package may import the listed parts of ours, and itself.
ALLOWED = {
    "ghn_service.errors": set(),
    "ghn_service.graph": {"ghn_service.errors"},
    "ghn_service.parameters": {"ghn_service.graph", "ghn_service.errors"},
    "ghn_service.hypernetwork": {
        "ghn_client.atomic_file",
        "ghn_service.parameters",
        "ghn_service.graph",
        "ghn_service.errors",
    },
    "ghn_service.postprocess": {"ghn_service.parameters", "ghn_service.graph", "ghn_service.errors"},
    "ghn_service.predictor": {
        "ghn_service.hypernetwork",
        "ghn_service.postprocess",
        "ghn_service.parameters",
        "ghn_service.graph",
        "ghn_service.errors",
    },
    "ghn_service.training": {
        "ghn_client.atomic_file",
        "ghn_service.predictor",
        "ghn_service.hypernetwork",
        "ghn_service.postprocess",
        "ghn_service.parameters",
        "ghn_service.graph",
        "ghn_service.errors",
        "ghn_architectures",
        "ghn_client.batchnorm",
    },
    "ghn_service.server": {
        "ghn_service",
        "ghn_service.predictor",
        "ghn_service.hypernetwork",
        "ghn_service.postprocess",
        "ghn_service.parameters",
        "ghn_service.graph",
        "ghn_service.errors",
        "ghn_client.atomic_file",
        "ghn_client.wire",
    },
    "ghn_architectures": {"ghn_service.graph", "ghn_service.errors"},
    "ghn_architectures.examples": {"ghn_architectures", "ghn_client"},
    # The embedded server is reached lazily (see embedded.py).
    "ghn_client": set(),
}

# A library may be imported only from the listed places.
HOMES = {
    "torch_geometric": {"ghn_service/hypernetwork"},
    "grpc": {"ghn_service/server", "clients/ghn_client"},
    "google": {"ghn_service/server", "clients/ghn_client", "ghn_service/graph/onnx"},
}


def source_files() -> list[Path]:
    folders = ("ghn_service", "architectures", "clients/ghn_client")
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py") if "_pb2" not in path.name)


def module_name(path: Path) -> str:
    relative = path.relative_to(ROOT).with_suffix("")
    parts = [part for part in relative.parts if part not in ("clients", "architectures")]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module


def rule_for(name: str) -> str | None:
    matches = [prefix for prefix in ALLOWED if name == prefix or name.startswith(prefix + ".")]
    return max(matches, key=len) if matches else None


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downward_only(path: Path) -> None:
    name = module_name(path)
    rule = rule_for(name)
    if rule is None:
        return
    for imported in imported_modules(path):
        if imported.split(".")[0] not in {"ghn_service", "ghn_client", "ghn_architectures"}:
            continue
        allowed = {rule, *ALLOWED[rule]}
        # Importing the package itself (for its version) is harmless; importing one of its parts is not.
        fits = any(imported == item or (item != "ghn_service" and imported.startswith(item + ".")) for item in allowed)
        if imported == "ghn_service":
            fits = "ghn_service" in allowed
        lazily = name == "ghn_client.embedded" and imported.startswith("ghn_service.")
        assert fits or lazily, f"{name} imports {imported}"


@pytest.mark.parametrize("library", HOMES)
def test_libraries_stay_at_home(library: str) -> None:
    for path in source_files():
        place = path.relative_to(ROOT).as_posix()
        if any(place.startswith(home) for home in HOMES[library]):
            continue
        strangers = [name for name in imported_modules(path) if name.split(".")[0] == library]
        assert not strangers, f"{place} imports {strangers}"


def test_the_graph_is_free_of_torch() -> None:
    for path in source_files():
        if path.is_relative_to(ROOT / "ghn_service" / "graph"):
            assert "torch" not in {name.split(".")[0] for name in imported_modules(path)}, path.name


def test_onnx_is_read_in_one_folder_of_the_service() -> None:
    folder = ROOT / "ghn_service" / "graph" / "onnx"
    for path in source_files():
        if path.is_relative_to(ROOT / "ghn_service") and not path.is_relative_to(folder):
            assert "onnx" not in {name.split(".")[0] for name in imported_modules(path)}, path.name
