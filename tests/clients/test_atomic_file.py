"""Files that others rely on: whole or not at all, links stay, and only regular files are replaced."""

from __future__ import annotations

import os
import socket
import stat
import threading
from pathlib import Path

import pytest

from ghn_client.atomic_file import replaced_file, write_file
from ghn_client.errors import FileError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("content", ["ein süßer Text", b"bytes", memoryview(b"view")], ids=["text", "bytes", "view"])
def test_a_file_is_written_and_nothing_else_is_left(content, tmp_path: Path) -> None:
    write_file(tmp_path / "a", content)
    assert (tmp_path / "a").read_bytes() == (content.encode() if isinstance(content, str) else bytes(content))
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("before", [None, "old"])
@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, OSError])
def test_a_failure_leaves_everything_as_it_was(failure, before: str | None, tmp_path: Path) -> None:
    if before is not None:
        (tmp_path / "a").write_text(before)

    def write_half() -> None:
        with replaced_file(tmp_path / "a") as part:
            part.write_text("half")
            raise failure

    with pytest.raises(failure):
        write_half()
    assert names(tmp_path) == ([] if before is None else ["a"])
    assert before is None or (tmp_path / "a").read_text() == before


def test_the_target_of_a_link_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    for target in ("real/old", "real/new"):
        link = tmp_path / f"link to {Path(target).name}"
        link.symlink_to(target)
    (tmp_path / "real" / "old").write_text("before")
    for link in ("link to old", "link to new"):
        write_file(tmp_path / link, "after")
        assert (tmp_path / link).is_symlink()
    assert names(tmp_path / "real") == ["new", "old"]
    assert (tmp_path / "real" / "old").read_text() == (tmp_path / "real" / "new").read_text() == "after"


def test_permissions_are_those_of_the_old_file_or_the_usual_ones(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    for name in ("new", "old"):
        if name == "old":
            (tmp_path / name).touch(mode=0o640)
        with replaced_file(tmp_path / name) as part:
            part.write_text("x")
            part.chmod(0o600)
    modes = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in names(tmp_path)}
    assert modes == {"usual": modes["usual"], "new": modes["usual"], "old": 0o640}


def test_a_pipe_gets_the_bytes_and_stays_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    write_file(pipe, b"x" * 200_000)
    reader.join(timeout=30)
    assert read == [b"x" * 200_000]
    assert pipe.is_fifo()
    assert names(tmp_path) == ["pipe"]


def test_what_is_neither_file_nor_pipe_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        for name in ("folder", "socket"):
            with pytest.raises(FileError, match="neither a file nor a pipe"):
                write_file(tmp_path / name, "x")
    assert names(tmp_path) == ["folder", "socket"]


def test_a_missing_folder_and_a_circle_of_links_are_refused(tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to("circle")
    for name in ("missing/a", "circle"):
        with pytest.raises(FileError, match="cannot write"):
            write_file(tmp_path / name, "x")
    assert (tmp_path / "circle").is_symlink()


def test_a_name_may_be_as_long_as_the_system_allows(tmp_path: Path) -> None:
    write_file(tmp_path / ("ä" * 127), "x")
    assert names(tmp_path) == ["ä" * 127]
