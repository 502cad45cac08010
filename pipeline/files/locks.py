"""Folders below a root: where a study's files are, and locks for one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import InvalidInput, Problem, StorageError

LOCK = "lock"
"""Name of the file in a study's folder that the search of the study keeps locked."""


def is_study_name(text: str) -> bool:
    """Return whether a text may name a study, and therefore a folder: such a name leads to no other folder."""
    return re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", text) is not None


def study_folder(root: Path, study: str) -> Path:
    """Return the folder of a study's files: `best.yaml`, checkpoints, the lock."""
    assert is_study_name(study), study
    return root / "mlruns" / "studies" / study


def refuse_links(root: Path, *paths: Path) -> None:
    """Refuse paths below a root of which a part is a link; the root itself may be one.

    A root may come from anyone, and a link in it may lead anywhere, to files that a search would then replace.

    Raises:
        InvalidInput: With every link.
    """
    between = {place for path in paths for place in (path, *path.parents) if place.is_relative_to(root)} - {root}
    remedy = "links below a root are not followed; put what it leads to in its place, or name another --root"
    links = sorted(place for place in between if place.is_symlink())
    if links:
        raise InvalidInput(
            "--root", [Problem(str(link), f"is a link to {link.readlink()}; {remedy}") for link in links]
        )


def lock(handle: int, path: Path, *, wait: bool = True) -> None:
    """Lock a file or folder for this process until its handle is closed.

    Raises:
        BlockingIOError: Another process has locked it, and `wait` is False.
        StorageError: The file system has no locks.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:  # as of network file systems
        remedy = "a search needs a file system with locks; name another --root"
        raise StorageError(f"{path}: cannot be locked: {error.strerror}; {remedy}") from None


@contextlib.contextmanager
def folder_locked(folder: Path) -> Iterator[None]:
    """Make a folder and lock it, after any other process has unlocked it; the lock ends with the process at the latest.

    Raises:
        OSError: The folder cannot be made.
        StorageError: The file system has no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        lock(handle, folder)
        yield
    finally:
        os.close(handle)
