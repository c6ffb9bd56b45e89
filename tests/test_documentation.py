"""What README and docs promise: links, paths, names, commands and flags exist, and the Python blocks run as written."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
import typer.main
from typer.testing import CliRunner

import ghn_client.cli.app
import ghn_service.__main__
import ghn_service.training.__main__
from ghn_architectures.registry import build_network
from ghn_client import GHNClient
from ghn_client.wire.metadata import PredictionMetadata, encode_metadata
from ghn_service.server.calls import STATUSES, StatusRow
from ghn_service.server.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
CARDS = ROOT / "ghn_service" / "checkpoints"
PAGES = [ROOT / "README.md", ROOT / "clients" / "README.md", *sorted((ROOT / "docs").glob("*.md")), *CARDS.glob("*.md")]
APPS = {
    "ghn-client": ghn_client.cli.app.app,
    "ghn-server": ghn_service.__main__.app,
    "ghn-train": ghn_service.training.__main__.app,
}
MODULES_OF_APPS = {"ghn_client": "ghn-client", "ghn_service": "ghn-server", "ghn_service.training": "ghn-train"}
OTHERS_FLAGS = {"--help", "--build-arg", "--no-deps", "--nproc-per-node"}
SERVE_FLAGS = {
    "--checkpoint",
    *(f"--{prefix}{name.replace('_', '-')}" for name in Settings.model_fields for prefix in ("", "no-")),
}
EXAMPLE_FILES = {"script.py", "train.py"}
"""Names of files that stand for the reader's own."""


def pages(among: list[Path] = PAGES) -> list:
    """The pages as test cases."""
    return [pytest.param(page, id=page.relative_to(ROOT).as_posix()) for page in among]


# ---- what a page says ----------------------------------------------------------------------------------------------


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def code_spans(page: Path) -> list[str]:
    """Inline code, which may go on in the next line."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose)]


def commands(page: Path) -> Iterator[list[str]]:
    """Commands of ours, as words: lines of every block, with ``$`` or without, and inline code."""
    fences = re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    lines = [line.removeprefix("$ ") for fence in fences for line in fence.replace("\\\n", " ").splitlines()]
    for text in [*lines, *code_spans(page)]:
        for part in re.split(r"&&|\|", text):
            if re.match(r"(make|ghn-client|ghn-server|ghn-train|torchrun|python) ", part.strip()):
                yield shlex.split(part, comments=True)


# ---- links, paths and names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", pages([*PAGES, ROOT / "CHANGELOG.md"]))
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    assert not [target for target in targets if "://" not in target and not (page.parent / target).exists()]


@pytest.mark.parametrize("page", pages())
def test_paths_and_names_exist(page: Path) -> None:
    missing = []
    for span in code_spans(page):
        missing += [path for path in re.findall(r"(?<![\w/.<*])\w[\w.-]*(?:/[\w.*-]+)+/?", span) if not is_there(path)]
        missing += [name for name in re.findall(r"^\w+\.(?:py|proto)$", span) if not is_file_name(name)]
        missing += [name for name in re.findall(r"\b(?:ghn_\w+|benchmarks)(?:\.\w+)+", span) if not is_name(name)]
    assert not missing


def is_there(path: str) -> bool:
    """Whether a path of ours exists; paths that do not begin with a folder of ours are the reader's."""
    bases = [base for base in (ROOT, ROOT / "clients", ROOT / "architectures") if (base / path.split("/")[0]).is_dir()]
    return not bases or any(list(base.glob(path.rstrip("/"))) for base in bases)


@cache
def is_file_name(name: str) -> bool:
    folders = ("ghn_service", "clients", "architectures", "benchmarks", "tests", "protos")
    return name in EXAMPLE_FILES or any(True for folder in folders for _ in (ROOT / folder).rglob(name))


@cache
def is_name(name: str) -> bool:
    """Whether a dotted name is a module of ours, or something in one."""
    parts = name.split(".")
    if parts[-1] in ("py", "md", "safetensors"):
        return True
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            if not hasattr(found, part) and part not in getattr(found, "__annotations__", {}):
                return False
            found = getattr(found, part, None)
        return True
    return False


# ---- commands ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", pages())
def test_commands_and_flags_exist(page: Path) -> None:
    wrong = [f"{' '.join(words)}: {fault}" for words in commands(page) if (fault := command_fault(words))]
    for span in code_spans(page):
        if span.startswith("-"):
            wrong += [flag for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", span) if not is_flag_of_any(flag)]
    assert not wrong


def command_fault(words: list[str]) -> str:
    """What is wrong with a command line, "" if nothing is."""
    if words[0] == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        return next((word for word in words[1:] if "=" not in word and word not in targets), "")
    if words[0] in APPS:
        return app_fault(words[0], words[1:])
    module, arguments = words[words.index("-m") + 1], words[words.index("-m") + 2 :]
    if module in MODULES_OF_APPS:
        return app_fault(MODULES_OF_APPS[module], arguments)
    found = importlib.util.find_spec(module)
    if found is None or (found.submodule_search_locations and not importlib.util.find_spec(f"{module}.__main__")):
        return f"no module {module} to run"
    ours = module.split(".")[0] in ("benchmarks", "ghn_architectures", "tests")
    return next((flag for flag in flags(arguments) if ours and flag not in texts_of("benchmarks")), "")


@pytest.mark.parametrize(
    "line",
    [
        "make nothing",
        "ghn-client nothing",
        "ghn-client predict m.onnx --nothing",
        "ghn-server serve --nothing=1",
        "python -m benchmarks.nothing",
        "python -m ghn_client predict --nothing",
        "python -m ghn_service.graph",
    ],
)
def test_commands_that_do_not_exist_are_noticed(line: str) -> None:
    assert command_fault(line.split())


def app_fault(name: str, words: list[str]) -> str:
    command = typer.main.get_command(APPS[name])
    known = {option for parameter in command.params for option in parameter.opts}
    chosen = next((word for word in words if not word.startswith("-")), "")
    if chosen in command.commands:
        known = {
            option
            for parameter in command.commands[chosen].params
            for option in (*parameter.opts, *parameter.secondary_opts)
        } | known
        if (name, chosen) == ("ghn-server", "serve"):
            known |= SERVE_FLAGS
    elif chosen and chosen != "COMMAND":
        return f"no command {chosen}"
    return next((flag for flag in flags(words) if flag not in known | {"-h", "--help"}), "")


def flags(words: list[str]) -> list[str]:
    return [word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)]


@cache
def is_flag_of_any(flag: str) -> bool:
    known = {
        option
        for app in APPS.values()
        for command in [typer.main.get_command(app), *typer.main.get_command(app).commands.values()]
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    return flag in known | OTHERS_FLAGS | SERVE_FLAGS or f'"{flag}"' in texts_of("benchmarks") + texts_of("tests/zoo")


@cache
def texts_of(folder: str) -> str:
    return "".join(path.read_text() for path in sorted((ROOT / folder).rglob("*.py")))


@pytest.mark.parametrize("option", ["-h", "--help", "--version"])
@pytest.mark.parametrize("name", APPS)
def test_commands_tell_about_themselves(name: str, option: str) -> None:
    assert CliRunner().invoke(APPS[name], [option]).exit_code == 0


def test_make_predict_leaves_nothing_for_git() -> None:
    recipe = re.search(r"^predict:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe
    folder = re.search(r"--output ([\w-]+/)", recipe[1])
    assert folder
    assert folder[1] in (ROOT / ".gitignore").read_text().split()


@pytest.mark.parametrize("module", MODULES_OF_APPS)
def test_modules_are_commands(module: str) -> None:
    result = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, check=False)
    assert result.returncode == 0


# ---- Python --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server_address() -> Iterator[str]:
    with GHNClient.embedded() as client:
        yield client.address


@pytest.mark.parametrize("page", pages([page for page in PAGES if blocks(page, "python")]))
def test_python_blocks_run_in_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.chdir(tmp_path)
    if 'os.environ["GHN_ADDRESS"]' in page.read_text():
        monkeypatch.setenv("GHN_ADDRESS", request.getfixturevalue("server_address"))
    namespace: dict = {"__name__": "page"}
    with torch.random.fork_rng(devices=[]):
        for number, block in enumerate(blocks(page, "python"), start=1):
            exec(compile(block, f"{page.name}, block {number}", "exec"), namespace)


@pytest.mark.skipif(not list(CARDS.glob("*.safetensors")), reason="no checkpoint is bundled")
def test_the_bundled_checkpoint_predicts_without_being_named() -> None:
    module = build_network("resnet20", num_classes=10)
    with GHNClient.embedded() as client:
        prediction = client.predict(module, torch.zeros(1, 3, 32, 32))
    assert prediction.load_into(module).is_complete
    assert set(prediction.origins.values()) == {"predicted"}


# ---- tables that must be whole -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_is_documented(name: str) -> None:
    assert f"| `{name}` |" in (ROOT / "docs" / "server.md").read_text()


@pytest.mark.parametrize("row", STATUSES.values(), ids=lambda row: row.reason)
def test_every_status_is_documented(row: StatusRow) -> None:
    assert f"| `{row.code.name}` | `{row.reason}` |" in (ROOT / "docs" / "server.md").read_text()


def test_every_key_of_the_metadata_is_documented() -> None:
    page = (ROOT / "docs" / "server.md").read_text()
    for key in encode_metadata(PredictionMetadata("", "", "", 0, "", ())):
        assert f"`{key}`" in page, key
