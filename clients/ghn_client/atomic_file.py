"""Files that are there whole or not at all: written beside their target, flushed to the disk, then renamed over it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ghn_client.errors import FileError


@contextlib.contextmanager
def replaced_file(path: str | Path) -> Iterator[Path]:
    """Gives a ``*.part`` file to write to; it takes the place of ``path`` if the body succeeds.

    If the body fails or is interrupted, the part is removed and ``path`` is as it was. Where ``path`` is a link, the
    file that it leads to is replaced and the link stays. A file that exists keeps its permissions. A pipe or a terminal
    cannot be replaced: it gets the bytes once they are complete.

    Raises:
        FileError: The folder is missing or cannot be written to, or ``path`` is neither a file nor a pipe.
    """
    part: Path | None = None
    old: os.stat_result | None = None
    try:
        with contextlib.suppress(FileNotFoundError):
            old = os.stat(path)
        streams = old is not None and (stat.S_ISFIFO(old.st_mode) or stat.S_ISCHR(old.st_mode))
        if old is not None and not streams and not stat.S_ISREG(old.st_mode):
            raise OSError(errno.EINVAL, "it is neither a file nor a pipe")
        target = Path(os.path.realpath(path))
        folder = Path(tempfile.gettempdir()) if streams else target.parent
        part = folder / f".{target.name[:50]}.{secrets.token_hex(4)}.part"  # a name may be as long as a name can be
        part.touch(exist_ok=False)
        mode = stat.S_IMODE(old.st_mode if old is not None else part.stat().st_mode)
        yield part
        with part.open("rb") as written:
            if streams:
                with open(path, "wb") as stream:
                    shutil.copyfileobj(written, stream)
            else:
                os.fsync(written.fileno())
                part.chmod(mode)  # what wrote the part may have left it to its owner alone, as safetensors does
                part.replace(target)
    except OSError as error:
        raise FileError(f"cannot write {str(path)!r}: {error.strerror or error}", strerror=error.strerror) from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def file_digest(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_file(path: str | Path, content: str | bytes | bytearray | memoryview) -> None:
    """Writes ``content``, text as UTF-8, as ``replaced_file`` does, with its errors."""
    with replaced_file(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
