"""What is imported is declared, and what is declared is imported, for both packages."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = {"ghn_architectures", "ghn_client", "ghn_service"}
# Distributions of modules that have another name; the longest prefix counts.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "google.protobuf": "protobuf",
    "google.rpc": "grpcio-status",
    "grpc": "grpcio",
    "grpc_health": "grpcio-health-checking",
    "grpc_reflection": "grpcio-reflection",
    "grpc_status": "grpcio-status",
    "huggingface_hub": "huggingface-hub",
    "onnx_ir": "onnx-ir",
    "opentelemetry.exporter": "opentelemetry-exporter-otlp-proto-grpc",
    "opentelemetry.instrumentation": "opentelemetry-instrumentation-grpc",
    "opentelemetry": "opentelemetry-sdk",
    "prometheus_client": "prometheus-client",
    "pydantic": "pydantic-settings",
    "pydantic_settings": "pydantic-settings",
    "torch.utils.tensorboard": "tensorboard",
    "torch_geometric": "torch-geometric",
}


def imported_distributions(folders: tuple[str, ...]) -> set[str]:
    found = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            modules: list[str] = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                # `from google.rpc import status_pb2`, but also `from google import rpc`
                modules = [f"{node.module}.{alias.name}" for alias in node.names]
            for module in modules:
                top = module.split(".")[0]
                if top not in sys.stdlib_module_names and top not in OURS:
                    prefixes = [name for name in DISTRIBUTIONS if f"{module}.".startswith(f"{name}.")]
                    found.add(DISTRIBUTIONS[max(prefixes, key=len)] if prefixes else top)
    return found


def declared_distributions(file: str, *extras: str) -> set[str]:
    project = tomllib.loads((ROOT / file).read_text())["project"]
    lines = project["dependencies"] + [line for name in extras for line in project["optional-dependencies"][name]]
    return {re.split(r"[^a-z0-9-]", line, maxsplit=1)[0] for line in lines}


@pytest.mark.parametrize(
    ("file", "extras", "folders"),
    [
        ("pyproject.toml", ("train", "tracing"), ("ghn_service", "architectures", "clients/ghn_client")),
        ("clients/pyproject.toml", ("images",), ("clients/ghn_client",)),
    ],
)
def test_what_is_imported_is_declared_and_the_other_way_round(file, extras, folders):
    assert imported_distributions(folders) == declared_distributions(file, *extras)


def test_pins_cover_what_is_declared():
    pinned = set(re.findall(r"^([a-z0-9-]+)==", (ROOT / "constraints.txt").read_text(), flags=re.M))
    assert declared_distributions("pyproject.toml", "train", "tracing", "test") - pinned <= {"ghn-service", "pyyaml"}


def test_the_server_does_not_need_the_extra_of_training():
    """The container is installed without it."""
    assert not {"pillow", "pyarrow", "tensorboard"} & declared_distributions("pyproject.toml")
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert 'ARG EXTRAS=""' in dockerfile
    install = [line for line in dockerfile.replace("${EXTRAS:+[$EXTRAS]}", "").splitlines() if "pip install" in line]
    assert not [line for line in install if "[" in line]
