"""The house's import directions: who may know whom, and which library lives where."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# What all that deals with named tensors may import, and all that predicts.
TENSORS = {"ghn_service.parameters", "ghn_service.graph", "ghn_service.errors"}
PREDICTOR = TENSORS | {f"ghn_service.{name}" for name in ("trust", "hypernetwork", "transfer", "postprocess")}
# A package may import the listed parts of ours, and itself.
ALLOWED = {
    "ghn_service.errors": set(),
    "ghn_service.published": {"ghn_service.errors"},
    "ghn_service.graph": {"ghn_service.errors", "ghn_client.errors"},
    "ghn_service.parameters": {"ghn_client.huge_pages", "ghn_service.graph", "ghn_service.errors"},
    "ghn_service.hypernetwork": TENSORS | {"ghn_client.atomic_file", "ghn_service.published"},
    "ghn_service.postprocess": TENSORS,
    "ghn_service.transfer": TENSORS
    | {"ghn_client.atomic_file", "ghn_client.errors", "ghn_service.postprocess.low_rank.kernels"},
    "ghn_service.trust": TENSORS | {"ghn_service.postprocess.weighted_layers"},
    "ghn_service.predictor": PREDICTOR,
    "ghn_service.training": PREDICTOR
    | {"ghn_service.predictor", "ghn_architectures", "ghn_client.atomic_file", "ghn_client.batchnorm"}
    | {"ghn_client.errors", "ghn_client.finetune.images", "ghn_client.onnx.export"},
    "ghn_service.server": PREDICTOR
    | {"ghn_service", "ghn_service.predictor", "ghn_service.published", "ghn_client.atomic_file", "ghn_client.wire"},
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


def ours(name: str) -> bool:
    return name.split(".")[0] in {"ghn_service", "ghn_client", "ghn_architectures"}


def imports_of(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """Modules that these nodes import, also by string: ``importlib.import_module("...")``, ``__import__("...")``."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            parts = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [part for part in parts if part in MODULES]
            yield from modules
            if len(modules) < len(parts):
                yield node.module
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value


def imported_modules(path: Path) -> Iterator[str]:
    """Everything that a file imports, wherever in it."""
    return imports_of(ast.walk(TREES[path]))


def imported_at_once(path: Path) -> set[str]:
    """Our modules that importing a file imports: outside functions, and not for type checkers alone."""
    found: set[str] = set()
    waiting: list[ast.AST] = [TREES[path]]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        found.update(name for name in imports_of([node]) if name in MODULES)
        waiting.extend(ast.iter_child_nodes(node))
    return found


def imported_in_functions(path: Path) -> set[str]:
    """Our modules that a file imports inside functions."""
    functions = (node for node in ast.walk(TREES[path]) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return {name for function in functions for name in imports_of(ast.walk(function)) if ours(name)}


def rule_for(name: str) -> str | None:
    matches = [prefix for prefix in ALLOWED if name == prefix or name.startswith(prefix + ".")]
    return max(matches, key=len) if matches else None


TREES = {path: ast.parse(path.read_text()) for path in source_files()}
MODULES = {module_name(path): path for path in source_files()}


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downward_only(path: Path) -> None:
    name = module_name(path)
    rule = rule_for(name)
    if rule is None:
        return
    for imported in imported_modules(path):
        if not ours(imported):
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


@pytest.mark.parametrize("package", ["ghn_service", "clients/ghn_client"])
def test_onnx_is_touched_in_one_folder_of_a_package(package: str) -> None:
    folder = ROOT / package / ("graph/onnx" if package == "ghn_service" else "onnx")
    for path in source_files():
        if path.is_relative_to(ROOT / package) and not path.is_relative_to(folder):
            libraries = {name.split(".")[0] for name in imported_modules(path)}
            assert not libraries & {"onnx", "onnx_ir", "onnxscript"}, path.name


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_our_modules_are_imported_on_top(path: Path) -> None:
    """Imports inside functions hide cycles; commands may import late what is slow to load."""
    if path.name not in ("__main__.py", "embedded.py") and "cli" not in path.relative_to(ROOT).parts:
        assert not set(imported_in_functions(path))


def test_there_is_no_import_cycle() -> None:
    waiting = {name: imported_at_once(path) - {name} for name, path in MODULES.items()}
    free: set[str] = set()
    while ready := {name for name, needed in waiting.items() if needed <= free}:
        free |= ready
        waiting = {name: needed for name, needed in waiting.items() if name not in ready}
    cycles = {name: needed - free for name, needed in waiting.items()}
    assert not cycles
