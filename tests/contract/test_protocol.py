"""The protocol file is well kept, the checked-in stubs are its own, and the server answers all of it."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

from ghn_client.wire import ghn_pb2
from ghn_service.server.service import GhnService

ROOT = Path(__file__).resolve().parents[2]
STUBS = ROOT / "clients" / "ghn_client" / "wire"


def buf(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs ``buf`` in the repository; skips the calling test where it is not installed."""
    beside = Path(sys.executable).with_name("buf")
    command = str(beside) if beside.exists() else shutil.which("buf")
    if command is None:
        pytest.skip("buf is not installed (pip install buf-bin)")
    return subprocess.run([command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_the_protocol_passes_lint() -> None:
    result = buf("lint")
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_protocol_is_formatted() -> None:
    result = buf("format", "--diff", "--exit-code")
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_stubs_describe_the_protocol(tmp_path: Path) -> None:
    built = tmp_path / "ghn.binpb"
    result = buf("build", "--exclude-source-info", "--as-file-descriptor-set", "--output", built)
    assert result.returncode == 0, result.stdout + result.stderr
    (wanted,) = descriptor_pb2.FileDescriptorSet.FromString(built.read_bytes()).file
    found = descriptor_pb2.FileDescriptorProto()
    ghn_pb2.DESCRIPTOR.CopyToProto(found)
    assert _without_json_names(found) == _without_json_names(wanted)


def _without_json_names(file: descriptor_pb2.FileDescriptorProto) -> descriptor_pb2.FileDescriptorProto:
    """One compiler writes the default JSON names, the other leaves them out; they follow from the names."""
    messages = list(file.message_type)
    while messages:
        message = messages.pop()
        messages.extend(message.nested_type)
        for field in message.field:
            field.ClearField("json_name")
    return file


def test_the_stubs_are_older_than_the_runtime_they_must_work_with() -> None:
    match = re.search(r"# Protobuf Python Version: (\d+)\.(\d+)", (STUBS / "ghn_pb2.py").read_text())
    assert match is not None
    assert (int(match[1]), int(match[2])) == (6, 31)


def test_no_top_level_package_of_the_protocol_is_installed() -> None:
    assert importlib.util.find_spec("ghn") is None


def test_the_server_answers_every_method_of_the_protocol() -> None:
    for method in ghn_pb2.DESCRIPTOR.services_by_name["GhnService"].methods:
        assert method.name in vars(GhnService), "the generated servicer would answer that it is not implemented"


@pytest.mark.slow
def test_regenerating_the_stubs_changes_nothing(tmp_path: Path) -> None:
    output = tmp_path / "stubs"
    output.mkdir()
    command = [sys.executable, ROOT / "protos" / "generate.py", "--output", output, "--environment", tmp_path / "env"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    if result.returncode and "pip" in result.stderr:
        pytest.skip(f"the pinned generator cannot be installed here: {result.stderr.splitlines()[-1]}")
    assert result.returncode == 0, result.stderr
    for path in output.iterdir():
        assert path.read_text() == (STUBS / path.name).read_text(), path.name
