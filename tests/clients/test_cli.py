"""The command line: data on stdout, words on stderr, a documented exit code per cause."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner, Result

from ghn_client import GHNClient, Prediction, __version__
from ghn_client.cli import app as cli
from ghn_client.cli.app import app
from ghn_client.cli.options import Server
from ghn_client.cli.tables import print_analysis
from ghn_client.info import Analysis, LowRankLayer, RankCost
from ghn_client.wire.metadata import TensorInfo
from ghn_service import errors as service_errors
from ghn_service.server.app import RunningServer
from tests.server.fake_predictor import FakePredictor, Gate, fake_server, raises
from tests.server.small_models import TINY


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with fake_server(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.onnx"
    path.write_bytes(TINY)
    return path


def run(*arguments: str | Path, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=env)


def test_predict_writes_the_weights_and_a_table(model: Path, server: RunningServer) -> None:
    result = run("predict", model, "--address", server.address)
    assert result.exit_code == 0
    assert set(Prediction.load("tiny.safetensors")) == {
        f"layers.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")
    }
    assert "layers.0" in result.stdout
    assert "5x6 + 5" in result.stdout


def test_a_dash_is_stdin_and_stdout(model: Path, server: RunningServer) -> None:
    command = [sys.executable, "-m", "ghn_client", "predict", "-", "-o", "-", "--address", server.address]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    piped = subprocess.run(command, input=TINY, capture_output=True, env=environment, timeout=60, check=True)
    assert run("predict", model, "-o", "w.safetensors", "--address", server.address).exit_code == 0
    assert piped.stdout == Path("w.safetensors").read_bytes()
    assert run("predict", model, "-o", "-", "--json", "--address", server.address).exit_code == 2


def test_json_is_all_of_stdout(model: Path, server: RunningServer) -> None:
    result = run("predict", model, "-o", "w.safetensors", "--onnx-out", "f.onnx", "--address", server.address, "--json")
    document = json.loads(result.stdout)
    assert document["output"] == "w.safetensors"
    assert document["onnx_output"] == "f.onnx"
    assert len(document["tensors"]) == 6
    assert Path("f.onnx").exists()


def test_options_reach_the_server(model: Path, server: RunningServer) -> None:
    options = ("--dtype", "bfloat16", "--seed", "7", "--include", "*.0.*", "--include", "*.1.*")
    assert run("predict", model, "--address", server.address, *options).exit_code == 0
    metadata = Prediction.load("tiny.safetensors").metadata
    assert (metadata.dtype, metadata.seed, metadata.include) == ("bfloat16", 7, ("*.0.*", "*.1.*"))


def test_the_address_may_come_from_the_environment(model: Path, server: RunningServer) -> None:
    assert run("predict", model, env={"GHN_ADDRESS": server.address}).exit_code == 0
    assert run("predict", model, "--address", "localhost:1", env={"GHN_ADDRESS": server.address}).exit_code == 5


def test_a_checkpoint_on_the_command_line_beats_an_address_of_the_environment(model: Path) -> None:
    result = run("predict", model, "--checkpoint", "nothing.safetensors", env={"GHN_ADDRESS": "localhost:1"})
    assert result.exit_code == 1
    assert "nothing.safetensors" in result.stderr


@pytest.mark.parametrize("command", ["analyze", "models"])
def test_the_other_questions(command: str, model: Path, server: RunningServer) -> None:
    arguments = [command, *([model] if command == "analyze" else []), "--address", server.address]
    assert run(*arguments).exit_code == 0
    document = json.loads(run(*arguments, "--json").stdout)
    assert document.get("model", None) == "fake" or document["models"][0]["name"] == "fake"


def large_analysis(count: int, **fields: Any) -> Analysis:
    tensors = tuple(TensorInfo(f"blocks.{index}.weight", "predicted", shape=(64, 64)) for index in range(count))
    sizes = {"num_nodes": count, "num_edges": count, "num_parameters": 4096 * count, "total_bytes": 16384 * count}
    names = {"model": "ghn", "graph_digest": "ab" * 32, "buffers": (), "warnings": (), "unknown_operators": ()}
    counts = {"num_predicted_parameters": 0, "op_type_counts": {"linear": count}}
    return Analysis(**names, **sizes, **counts, tensors=tensors, **fields)


def test_a_large_network_takes_a_screen_unless_all_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    cost = RankCost(8, 0.1, 1024, 1024)
    low_rank = tuple(
        LowRankLayer(f"blocks.{index}.weight", "function", "relu", False, "", cost, cost, (cost,))
        for index in range(200)
    )
    for fields in ({}, {"low_rank": low_rank}):
        lines = {}
        for show_all in (False, True):
            print_analysis(large_analysis(200, **fields), show_all=show_all)
            lines[show_all] = len(capsys.readouterr().out.splitlines())
        assert lines[False] <= 24
        assert lines[True] > 200


def test_health_is_an_exit_code(server: RunningServer) -> None:
    assert run("health", "--address", server.address).exit_code == 0
    assert json.loads(run("health", "--address", server.address, "--json").stdout) == {"alive": True, "ready": True}
    assert run("health", "--address", "localhost:1", "--timeout", "2").exit_code == 5


def test_the_version_is_printed() -> None:
    assert run("--version").stdout.strip() == f"ghn-client {__version__}"


@pytest.mark.parametrize(
    ("arguments", "exit_code"),
    [
        (["predict"], 2),
        (["predict", "tiny.onnx", "--dtype", "float8"], 2),
        (["predict", "tiny.onnx", "--seed", "-1"], 2),
        (["predict", "tiny.onnx", "-o", "tiny.onnx"], 2),
        (["predict", "tiny.onnx", "-o", "nowhere/w.safetensors"], 2),
        (["predict", "tiny.onnx", "-o", "same", "--onnx-out", "same"], 2),
        (["predict", "tiny.onnx", "--address", "localhost:1", "--checkpoint", "x"], 2),
        (["predict", "tiny.onnx", "--step", ":"], 2),
        (["predict", "tiny.onnx", "--model", "nothing"], 2),
        (["predict", "nothing.onnx"], 3),
        (["predict", "broken.onnx"], 3),
        (["predict", "tiny.onnx", "--address", "localhost:1"], 5),
        (["predict", "tiny.onnx", "--address", "elsewhere:1", "--token-file", "token"], 7),
        (["predict", "tiny.onnx", "--token-file", "nothing"], 7),
    ],
)
def test_causes_have_their_exit_codes(arguments: list[str], exit_code: int, model: Path, server: RunningServer) -> None:
    Path("broken.onnx").write_bytes(b"broken")
    Path("token").write_text("secret\n")
    before = sorted(Path().iterdir())
    if ("--address" not in arguments and exit_code != 2) or "--step" in arguments or "--model" in arguments:
        arguments = [*arguments, "--address", server.address]
    result = run(*arguments)
    assert result.exit_code == exit_code
    assert result.stdout == ""
    assert result.stderr
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize(
    ("raised", "exit_code"),
    [
        (service_errors.UnsupportedArchitectureError("quantised"), 4),
        (service_errors.LimitExceededError("large"), 4),
        (service_errors.OverloadedError("busy"), 8),
        (RuntimeError("a bug"), 1),
    ],
)
def test_failures_of_the_server_have_their_exit_codes(
    raised: Exception, exit_code: int, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "server").mkdir()
    with fake_server(tmp_path / "server", FakePredictor(raises(raised))) as server:
        assert run("predict", model, "--address", server.address).exit_code == exit_code


def test_a_deadline_has_its_exit_code(model: Path, tmp_path: Path) -> None:
    gate = Gate()
    (tmp_path / "server").mkdir()
    with fake_server(tmp_path / "server", FakePredictor(gate)) as server:
        assert run("predict", model, "--address", server.address, "--timeout", "0.3").exit_code == 6
        gate.opened.set()


@pytest.mark.parametrize(
    ("arguments", "exit_code", "kind"),
    [
        (["predict", "nothing.onnx"], 3, "InvalidArchitectureError"),
        (["analyze", "tiny.onnx", "--low-rank", "rank"], 2, "InvalidOptionError"),
        (["models", "--address", "localhost:1"], 5, "ServerUnavailableError"),
        (["plan", "nothing.onnx", "--samples", "10"], 3, "InvalidArchitectureError"),
        (["finetune", "nothing.onnx", "--data", "."], 3, "InvalidArchitectureError"),
    ],
)
def test_a_failure_is_json_where_json_was_asked_for(
    arguments: list[str], exit_code: int, kind: str, model: Path, server: RunningServer
) -> None:
    where = [] if "--address" in arguments or arguments[0] == "plan" else ["--address", server.address]
    result = run(*arguments, *where, "--json")
    error = json.loads(result.stdout)["error"]
    assert (result.exit_code, error["exit_code"], error["kind"]) == (exit_code, exit_code, kind)
    assert error["message"] in result.stderr


@pytest.mark.parametrize("command", ["predict", "analyze", "models", "health", "finetune"])
def test_every_command_that_asks_a_server_has_the_same_options_for_it(command: str) -> None:
    options = {option for item in get_command(app).commands[command].params for option in item.opts}
    names = ("address", "checkpoint", "token-file", "tls", "ca-file", "cert-file", "key-file", "timeout")
    assert {f"--{name}" for name in names} <= options
    assert ("--model" in options) == (command in ("predict", "analyze", "finetune"))


def test_the_start_of_a_server_is_not_counted_as_prediction(
    model: Path, server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, connect = [0.0], Server.connect

    def slow_start(options: Server, **given: Any) -> GHNClient:
        clock[0] += 1000
        return connect(options, **given)

    monkeypatch.setattr(cli, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(Server, "connect", slow_start)
    assert json.loads(run("predict", model, "--address", server.address, "--json").stdout)["seconds"] == 0.0


@pytest.mark.parametrize(("sent", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_command_leaves_nothing_behind(sent: int, exit_code: int, model: Path, tmp_path: Path) -> None:
    gate = Gate()
    (tmp_path / "server").mkdir()
    with fake_server(tmp_path / "server", FakePredictor(gate)) as server:
        command = [sys.executable, "-m", "ghn_client", "predict", str(model), "--address", server.address]
        ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
        signal.signal(signal.SIGINT, ignored)
        assert gate.entered.wait(60)
        time.sleep(0.2)
        process.send_signal(sent)
        process.communicate(timeout=30)
        gate.opened.set()
    assert process.returncode == exit_code
    assert sorted(path.name for path in tmp_path.iterdir()) == ["server", "tiny.onnx"]


def test_help_needs_neither_torch_nor_grpc() -> None:
    code = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['grpc'] = sys.modules['onnx'] = None\n"
        "from ghn_client.cli.app import app\n"
        "app(['predict', '--help'], standalone_mode=False)\n"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "--onnx-out" in finished.stdout
