"""The light wheel: builds alone, and works without anything of the server."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CLIENTS = ROOT / "clients"
FORBIDDEN = (
    "ghn_service",
    "ghn_architectures",
    "torch_geometric",
    "networkx",
    "pydantic_settings",
    "structlog",
    "scipy",
)
# torch itself imports networkx if it is there, so it is only forbidden to us.
BLOCKER = """
import importlib.abc, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {forbidden}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)
sys.meta_path.insert(0, Blocker())
sys.path[:] = [{folder!r}] + [entry for entry in sys.path if entry not in {hidden!r}]
"""
PROGRAM = """
import pkgutil, ghn_client, torch
from pathlib import Path
assert Path(ghn_client.__file__).is_relative_to({folder!r}), ghn_client.__file__
for info in pkgutil.walk_packages(ghn_client.__path__, "ghn_client."):
    if not info.name.endswith("__main__"):
        __import__(info.name)
data = ghn_client.export_architecture(torch.nn.Linear(3, 2), torch.zeros(1, 3))
client = ghn_client.GHNClient("localhost:1", max_attempts=1)
assert not client.health().alive
try:
    ghn_client.GHNClient.embedded()
except ghn_client.errors.EmbeddedServerError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pytest.importorskip("hatchling")
    builder = f"WheelBuilder({str(CLIENTS)!r}).build(directory={str(folder)!r})"
    code = f"from hatchling.builders.wheel import WheelBuilder; list({builder})"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_the_client_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert wheel.name.startswith("ghn_client-")
    assert {"ghn_client/client.py", "ghn_client/wire/ghn_pb2.py", "ghn_client/py.typed"} <= set(names)
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"ghn_client"}


def test_the_unpacked_wheel_works_without_the_server(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    blocker = BLOCKER.format(forbidden=FORBIDDEN, folder=str(tmp_path), hidden=[str(ROOT), str(CLIENTS)])
    program = blocker + PROGRAM.format(folder=str(tmp_path))
    finished = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert "ghn-service" in finished.stdout


def test_every_library_that_is_imported_at_once_is_a_dependency() -> None:
    project = tomllib.loads((CLIENTS / "pyproject.toml").read_text())["project"]
    declared = {item.partition(">")[0].replace("-", "_") for item in project["dependencies"]}
    provides = {
        "grpcio": "grpc",
        "grpcio_health_checking": "grpc_health",
        "grpcio_status": "grpc_status",
        "protobuf": "google",
    }
    provided = {provides.get(name, name) for name in declared} | {"ghn_client"} | set(sys.stdlib_module_names)
    for path in (CLIENTS / "ghn_client").rglob("*.py"):
        strangers = packages_imported_at_once(path) - provided
        assert not strangers, f"{path.name} imports {strangers}"


def packages_imported_at_once(path: Path) -> set[str]:
    """Packages that the statements at the top of a module import; what functions import may be missing."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.partition(".")[0])
    return found


def test_both_packages_ask_for_the_same_versions() -> None:
    client = tomllib.loads((CLIENTS / "pyproject.toml").read_text())["project"]["dependencies"]
    whole = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert set(client) <= set(whole)


@pytest.mark.slow
def test_the_wheel_installs_into_a_fresh_environment(wheel: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    install = [tmp_path / "venv" / "bin" / "python", "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, "-c", ROOT / "constraints.txt", "torch==2.13.0", wheel], check=True)
    finished = subprocess.run(
        [tmp_path / "venv/bin/ghn-client", "--version"], capture_output=True, text=True, check=True
    )
    assert finished.stdout.startswith("ghn-client ")
