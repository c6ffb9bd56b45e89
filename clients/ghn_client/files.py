"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ghn_client.errors import PredictionFileError


@contextlib.contextmanager
def replaced_file(path: str | Path) -> Iterator[Path]:
    """Gives a ``*.part`` file beside ``path`` to write to; it takes the place of ``path`` if the body succeeds.

    If the body fails or is interrupted, the part is removed and ``path`` is as it was.

    Raises:
        PredictionFileError: The folder is missing, or cannot be written to.
    """
    target = Path(path)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
        os.close(handle)
        part = Path(name)
    except OSError as error:
        raise PredictionFileError(f"cannot write to {str(target)!r}: {error.strerror}") from error
    try:
        yield part
        _flush(part)
        part.chmod(0o666 & ~_umask())
        part.replace(target)
    except OSError as error:
        raise PredictionFileError(f"cannot write {str(target)!r}: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
