"""Makes the stubs of ``clients/ghn_client/wire`` from ``ghn.proto``; run by ``make proto``.

The generator lives in a virtual environment of its own, pinned by ``requirements.txt``, because stubs of an older
protoc load with every later protobuf, and not the other way round. The stubs get an import name of our own: no
top-level package ``ghn`` is installed. Needs nothing but Python and an index to install six packages from.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
PROTO = "ghn/v1/ghn.proto"
STUBS = ("ghn_pb2.py", "ghn_pb2.pyi", "ghn_pb2_grpc.py", "ghn_pb2_grpc.pyi")
DEFAULT_OUTPUT = FOLDER.parent / "clients" / "ghn_client" / "wire"
DEFAULT_ENVIRONMENT = FOLDER.parent / "build" / "stub-generator"

REPLACEMENTS = (
    ("from ghn.v1 import ghn_pb2 as ghn_dot_v1_dot_ghn__pb2", "from . import ghn_pb2 as ghn_dot_v1_dot_ghn__pb2"),
    ("import ghn.v1.ghn_pb2\n", "from . import ghn_pb2\n"),
    ("ghn.v1.ghn_pb2.", "ghn_pb2."),
    ("'ghn.v1.ghn_pb2'", "'ghn_client.wire.ghn_pb2'"),
)
"""Text of protoc that assumes the package path ``ghn.v1``, and what stands in our stubs instead."""


def prepare_environment(environment: Path) -> Path:
    """Creates the generator's environment where it is missing or outdated; returns its Python."""
    python = environment / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    requirements = FOLDER / "requirements.txt"
    mark = environment / "installed.txt"
    if not mark.exists() or mark.read_text() != requirements.read_text():
        venv.create(environment, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--requirement", requirements], check=True)
        mark.write_text(requirements.read_text())
    return python


def run_protoc(python: Path, output: Path) -> None:
    """Runs the generator on ``ghn.proto``; the raw stubs land under ``output``."""
    options = [f"--proto_path={FOLDER}", f"--python_out={output}", f"--grpc_python_out={output}"]
    plugins = [f"--plugin={name}={python.parent / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")]
    typing = [f"--mypy_out=quiet:{output}", f"--mypy_grpc_out=quiet:{output}"]
    subprocess.run([python, "-m", "grpc_tools.protoc", *options, *plugins, *typing, PROTO], check=True)


def generate(output: Path, environment: Path = DEFAULT_ENVIRONMENT) -> None:
    """Writes the four stub files into ``output``."""
    python = prepare_environment(environment)
    with tempfile.TemporaryDirectory() as temporary:
        run_protoc(python, Path(temporary))
        for name in STUBS:
            text = (Path(temporary) / "ghn" / "v1" / name).read_text()
            for old, new in REPLACEMENTS:
                text = text.replace(old, new)
            (output / name).write_text(text)


def main() -> None:
    """Command line of this file."""
    parser = argparse.ArgumentParser(description="Makes the Python stubs from ghn.proto.")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="folder to write the stubs to")
    parser.add_argument("--environment", type=Path, default=DEFAULT_ENVIRONMENT, help="folder of the generator")
    arguments = parser.parse_args()
    generate(arguments.output, arguments.environment)


if __name__ == "__main__":
    main()
