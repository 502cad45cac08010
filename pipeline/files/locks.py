"""Folders below a root: where a study's files are, and locks for one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

LOCK = "lock"
"""Name of the file in a study's folder that the search of the study keeps locked."""


def study_folder(root: Path, study: str) -> Path:
    """Return the folder of a study's files: `best.yaml`, checkpoints, the lock."""
    return root / "mlruns" / "studies" / study


@contextlib.contextmanager
def folder_locked(folder: Path) -> Iterator[None]:
    """Make a folder and lock it, after any other process has unlocked it; the lock ends with the process at the latest.

    Raises:
        OSError: The folder cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
