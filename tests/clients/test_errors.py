"""One family of errors: every class has the exit code that ``docs/client.md`` promises for its cause."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest
import typer

import ghn_client
from ghn_client import errors
from ghn_client.cli.options import ending_well

EXIT_CODES = {
    "GhnClientError": 1,
    "InvalidOptionError": 2,
    "UnknownModelError": 2,
    "SourceError": 4,
    "InvalidArchitectureError": 3,
    "ExportError": 3,
    "UnsupportedArchitectureError": 4,
    "UnsupportedModuleError": 4,
    "UnsupportedOptionError": 4,
    "LimitExceededError": 4,
    "InfeasibleError": 4,
    "TemporaryError": 1,
    "ServerUnavailableError": 5,
    "DeadlineExceededError": 6,
    "AuthenticationError": 7,
    "OverloadedError": 8,
    "ServerError": 1,
    "StreamCorruptedError": 1,
    "EmbeddedServerError": 1,
    "FileError": 1,
    "LoadError": 1,
    "MissingExtraError": 1,
}


def family() -> list[type[errors.GhnClientError]]:
    """All error classes of the package, wherever they are defined."""
    found, waiting = [], [errors.GhnClientError]
    for module in pkgutil.walk_packages(ghn_client.__path__, "ghn_client."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    while waiting:
        found.append(waiting.pop())
        waiting.extend(found[-1].__subclasses__())
    return found


def test_the_family_is_in_one_file_and_in_the_table() -> None:
    assert {kind.__name__ for kind in family()} == set(EXIT_CODES)
    assert {inspect.getmodule(kind) for kind in family()} == {errors}


@pytest.mark.parametrize(("name", "code"), EXIT_CODES.items(), ids=EXIT_CODES)
def test_a_command_ends_with_the_documented_code(name: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "client.md").read_text()
    with pytest.raises(typer.Exit) as caught, ending_well():
        raise getattr(errors, name)("why it ended")
    assert caught.value.exit_code == code
    assert "why it ended" in capsys.readouterr().err
    assert f"| {code} |" in page


def test_a_file_error_is_an_os_error_with_its_reason(tmp_path: Path) -> None:
    error = errors.FileError("cannot write 'a': no space", strerror="no space")
    assert isinstance(error, OSError)
    assert (str(error), error.strerror, error.field) == ("cannot write 'a': no space", "no space", "")
