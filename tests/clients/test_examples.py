"""Every example runs from top to bottom with small settings, and ends with a figure beside the default start."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ghn_service.server.access import append_token, make_token
from ghn_service.server.app import start_server
from ghn_service.server.settings import load_settings
from tests.finetune.public_libraries import example, public_library
from tests.server.certificates import Certificates

EXAMPLES = Path(__file__).parents[2] / "clients" / "examples"
SMALL = ["--images", "128", "--steps", "2"]
LIBRARIES = {"hf_trainer": ("transformers", "accelerate"), "lightning_training": ("lightning",)}
ELSEWHERE = {"common", "remote_server", "distributed", "transfer"}
FIGURE = re.compile(r"\d+\.\d% from predicted weights, \d+\.\d% from the default initialisation")


def check_figure(printed: str) -> None:
    assert FIGURE.search(printed.strip().splitlines()[-1]), printed


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem not in ELSEWHERE))
def test_an_example_ends_with_its_figure(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for library in LIBRARIES.get(name, ()):
        public_library(library)
    monkeypatch.chdir(tmp_path)
    example(name).main(SMALL)
    check_figure(capsys.readouterr().out)


def test_the_notebook_runs_and_shows_the_page(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    cells = json.loads((EXAMPLES / "report_page.ipynb").read_text())["cells"]
    names: dict[str, Any] = {}
    for cell in (cell for cell in cells if cell["cell_type"] == "code"):
        assert not cell["outputs"]
        exec("".join(cell["source"]).replace("parse_args([])", f"parse_args({SMALL})"), names)
    assert "<iframe" in names["report"]._repr_html_()
    check_figure(capsys.readouterr().out)


def test_the_remote_server_is_asked_over_tls_with_a_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    certificates = Certificates(tmp_path)
    certificate, key = certificates.issue("server", "localhost")
    token, line = make_token("alice")
    append_token(tmp_path / "tokens", line)
    (tmp_path / "alice.token").write_text(token)
    settings = load_settings(
        port=0, tls_certificate=certificate, tls_key=key, tokens=tmp_path / "tokens", device=("cpu",)
    )
    with start_server(settings) as server:
        server.wait_ready()
        address = f"localhost:{server.address.rpartition(':')[2]}"
        access = ["--ca-file", str(certificates.ca), "--token-file", str(tmp_path / "alice.token")]
        example("remote_server").main(["--address", address, *access, *SMALL])
    check_figure(capsys.readouterr().out)


def run_two_processes(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(EXAMPLES / "distributed.py"), *options, *SMALL]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)


@pytest.mark.slow
def test_two_processes_ask_one_server(tmp_path: Path) -> None:
    with start_server(load_settings(port=0, device=("cpu",))) as server:
        server.wait_ready()
        finished = run_two_processes(tmp_path, "--address", server.address)
        predictions_saved = server.replies.num_hits + server.replies.num_followed
    assert finished.returncode == 0, finished.stderr
    check_figure(finished.stdout)
    assert predictions_saved == 1


@pytest.mark.slow
def test_two_processes_share_the_server_of_the_first(tmp_path: Path) -> None:
    finished = run_two_processes(tmp_path)
    assert finished.returncode == 0, finished.stderr
    check_figure(finished.stdout)
