"""The Dockerfile: linted, sound in what matters, and its steps really install and start the server."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
Instruction = tuple[str, str]
BASE_IMAGE_BYTES = 130_000_000
"""Of python:3.11-slim-bookworm, unpacked."""
MAX_IMAGE_BYTES = 1_600_000_000


def instructions() -> list[Instruction]:
    """The Dockerfile's instructions: keyword and argument, continuation lines joined."""
    text = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1].strip()) for line in lines]


def arguments(keyword: str) -> list[str]:
    return [argument for name, argument in instructions() if name == keyword]


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not installed; make lint installs it")
    result = subprocess.run([hadolint, str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_the_server_does_not_run_as_root() -> None:
    assert arguments("USER")[-1] not in ("root", "0")
    last_user = max(index for index, (name, _) in enumerate(instructions()) if name == "USER")
    assert all(name not in ("RUN", "COPY", "ADD") for name, _ in instructions()[last_user:])


def test_torch_comes_without_cuda_unless_asked_for() -> None:
    (index,) = (argument for argument in arguments("ARG") if argument.startswith("TORCH_INDEX_URL="))
    assert index.endswith("/cpu")
    assert any('--extra-index-url "$TORCH_INDEX_URL"' in step and "torch==" in step for step in arguments("RUN"))


def test_build_tools_stay_in_the_first_stage() -> None:
    assert len(arguments("FROM")) == 2
    assert any(argument.startswith("--from=build") for argument in arguments("COPY"))


def test_health_is_asked_with_our_own_client_where_it_needs_no_tls() -> None:
    assert "GHN_HEALTH_PORT=50052" in arguments("ENV")[-1]
    assert json.loads(arguments("HEALTHCHECK")[0].partition("CMD ")[2])[-1] == "localhost:50052"
    assert json.loads(arguments("HEALTHCHECK")[0].partition("CMD ")[2])[:2] == ["ghn-client", "health"]


def test_everything_that_is_copied_exists_and_is_sent_to_the_engine() -> None:
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for argument in arguments("COPY"):
        if not argument.startswith("--from"):
            for source in argument.split()[:-1]:
                assert (ROOT / source).exists()
                assert source in sent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def is_reachable(url: str) -> bool:
    """Whether a package index answers; without it pip's own has to do."""
    if not url.startswith("https://"):
        return False
    try:
        with socket.create_connection((url.split("/")[2], 443), timeout=3):
            return True
    except OSError:
        return False


def num_bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


class CleanDirectory:
    """Runs the instructions as an engine would, in a folder that stands for the container's root."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith(("GHN_", "PYTHON"))}
        self.environment["HOME"] = str(root)

    def inside(self, text: str) -> str:
        """The text with the container's own paths below the root."""
        return re.sub(r"(?<![\w.])/(opt|build|home)\b", rf"{self.root}/\1", text)

    def run(self, keyword: str, argument: str) -> None:
        if keyword == "WORKDIR":
            self.folder = Path(self.inside(argument))
            self.folder.mkdir(parents=True, exist_ok=True)
        elif keyword == "ENV":
            for name, value in re.findall(r"(\w+)=(\S+)", argument):
                self.environment[name] = os.path.expandvars(self.inside(value).replace("${DEVICE}", "cpu"))
                if name == "PATH":
                    self.environment[name] = self.inside(value).replace("$PATH", os.environ["PATH"])
        elif keyword == "ARG" and is_reachable(argument.partition("=")[2]):
            self.environment["TORCH_INDEX_URL"] = argument.partition("=")[2]
        elif keyword == "COPY" and not argument.startswith("--from"):
            *sources, target = argument.split()
            for source in sources:
                place = self.folder / target
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, place, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / source, place)
        elif keyword == "RUN" and not argument.startswith("useradd"):
            subprocess.run(["sh", "-ec", self.inside(argument)], cwd=self.folder, env=self.environment, check=True)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_steps_install_and_start_a_healthy_server(tmp_path: Path) -> None:
    if not list((ROOT / "ghn_service" / "checkpoints").glob("*.safetensors")):
        pytest.skip("no checkpoint is bundled yet")
    container = CleanDirectory(tmp_path)
    for keyword, argument in instructions():
        container.run(keyword, argument)
    python = tmp_path / "opt" / "ghn" / "bin" / "python"
    question = [str(python), "-c", "import torch; print(torch.version.cuda)"]
    if subprocess.run(question, capture_output=True, text=True, check=True).stdout.strip() == "None":
        assert num_bytes(tmp_path / "opt" / "ghn") + BASE_IMAGE_BYTES < MAX_IMAGE_BYTES
    port = str(free_port())
    container.environment |= {"GHN_PORT": str(free_port()), "GHN_HEALTH_PORT": port, "GHN_HOST": "127.0.0.1"}
    command = json.loads(arguments("ENTRYPOINT")[0]) + json.loads(arguments("CMD")[0])
    health = json.loads(arguments("HEALTHCHECK")[0].partition("CMD ")[2].replace("50052", port))
    path = container.environment["PATH"]
    executable = shutil.which(command[0], path=path)
    assert executable is not None
    assert executable.startswith(str(tmp_path))
    server = subprocess.Popen([executable, *command[1:]], cwd=container.folder, env=container.environment)
    try:
        deadline = time.monotonic() + 120
        asked = [str(shutil.which(health[0], path=path)), *health[1:]]
        while subprocess.run(asked, env=container.environment, check=False).returncode != 0:
            assert server.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server did not become healthy"
            time.sleep(1)
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    finally:
        server.kill()
