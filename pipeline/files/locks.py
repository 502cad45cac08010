"""Folders below a root: where a study's files are, and the right to write somewhere, one process after the other."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

LOCK = "lock"
"""The file in a study's folder that is locked by the process that drives the study."""


def study_folder(root: Path, study: str) -> Path:
    """Return the folder of what a study writes for people, and of its checkpoints."""
    return root / "mlruns" / "studies" / study


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Make a folder, wait until no other process holds it, and hold it; the system takes it back when a process ends.

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
