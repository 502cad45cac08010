"""Write files whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_TEMPORARY = ".tmp"
"""Suffix of files that are not complete yet."""


def write_atomic(path: Path, *content: str | bytes) -> None:
    """Replace a file so that a reader, or a restart after a crash, sees the old content or the new, never a part.

    An existing file keeps its permissions. A file that may not be written is not replaced.

    Raises:
        OSError: The file cannot be written.
    """
    with opened_atomic(path) as file:
        file.writelines(part.encode() if isinstance(part, str) else part for part in content)


@contextlib.contextmanager
def opened_atomic(path: Path) -> Iterator[BinaryIO]:
    """Open a file for what `write_atomic` writes; the file is replaced when the block ends without an exception.

    Raises:
        OSError: The file cannot be written.
    """
    check_writable(path)
    mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o644
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_TEMPORARY)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(mode)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def check_writable(path: Path) -> None:
    """Raise the OSError that writing a file would raise: a permission is missing, or something else has the path."""
    folder = next(place for place in path.absolute().parents if place.exists())
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():  # a device, which a file would replace
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    if path.is_symlink() and not path.exists():
        raise FileNotFoundError(errno.ENOENT, "Is a link to nothing", str(path))
    if not os.access(folder, os.W_OK | os.X_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def sweep(folder: Path) -> None:
    """Remove the temporary files that killed processes left in a folder and the folders below it."""
    for path in folder.rglob(f".*{_TEMPORARY}"):
        path.unlink()
