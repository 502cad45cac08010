"""Checkpoints of a running group, in files that are written completely or not at all.

A file is a line that names its format, a line with the SHA-256 of the rest and the length of the last line, parts, each
as `torch.save` writes it, and a last line with the sizes of the parts. The first part has plain values, each other the
state of a trial. Parts are read with `weights_only=True`, so that loading runs no code. They are made, written and read
one after another, so that saving takes the memory of one trial's state at most. The last two files are kept, in case
the newest is damaged.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from pipeline.errors import StorageError
from pipeline.files.atomic import opened_atomic

FORMAT = 3
MAX_SAVING_SHARE = 0.02
"""Largest share of the run time that saving may take."""
ASSUMED_SAVE_S = 0.02
"""Assumed duration of the first save, in seconds."""
CHECKPOINTS_KEPT = 2
_TITLE = b"checkpoint of lr-strategy-search, format "
_LINE = 200
"""Most bytes of each of the first two lines."""
_HASH = "%64s %10d\n"
"""The second line."""
STATES = "state"
"""Key of the loaded content under which the states of the trials are."""


class Checkpoints:
    """The checkpoints of one study.

    Args:
        folder: Holds only checkpoints; the first save makes it.
        warn: Takes one sentence about each file that cannot be used.
        share: Largest share of the run time that saving may take; 1 to save whenever asked.
    """

    def __init__(self, folder: Path, *, warn: Callable[[str], None], share: float = MAX_SAVING_SHARE) -> None:
        self.folder = folder
        self.warn = warn
        self._share = share
        self._last = time.monotonic()
        self._took = ASSUMED_SAVE_S if share < 1 else 0.0

    def due(self) -> bool:
        """Return whether a save as long as the last one would keep within the share of the run time."""
        return time.monotonic() - self._last >= self._took / self._share

    def save(
        self, name: str, content: Mapping[str, Any], states: Callable[[], Iterable[tuple[str, Any]]] = tuple
    ) -> None:
        """Write a checkpoint, synced to the disk.

        Args:
            name: Name of the file; later names sort after earlier names.
            content: Plain values.
            states: Returns number and state of each trial, which may be made one after another; called here, so that
                the time to copy from a device counts as saving.

        Raises:
            StorageError: The file cannot be written; earlier checkpoints are unchanged.
        """
        start = time.monotonic()
        with _storage_errors(self.folder / name, "written"), opened_atomic(self.folder / name) as file:
            file.write(_TITLE + str(FORMAT).encode() + b"\n")
            place = file.tell()
            file.write((_HASH % ("", 0)).encode())  # of nothing yet
            payload = _Hashed(file)
            sizes = [payload.add(dict(content))]
            for number, state in states():
                sizes.append(payload.add({number: state}))
                del state  # before the next one is made
            last = json.dumps(sizes).encode()
            payload.write(last)
            payload.raise_failure()
            file.seek(place)
            file.write((_HASH % (payload.sha256.hexdigest(), len(last))).encode())
        self._remove(self._paths()[CHECKPOINTS_KEPT:])
        self._last = time.monotonic()
        self._took = self._last - start

    def load(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Yield path and content of each valid checkpoint, newest first; warn of the others."""
        for path in self._paths():
            content = _read(path)
            if isinstance(content, str):
                self.warn(f"{path}: {content}")
            else:
                yield path, content

    def put_aside(self, path: Path) -> Path:
        """Rename a checkpoint so that it is not loaded again, and a person can restore it; return the new path."""
        return path.replace(path.with_suffix(".unused"))

    def forget_unused(self, *, before: str) -> None:
        """Remove the files that were put aside and whose names sort before a name.

        Raises:
            StorageError: A file cannot be removed.
        """
        self._remove(path for path in self.folder.glob("*.unused") if path.name < before)

    def clear(self, *, but: Path | None = None) -> None:
        """Remove every checkpoint except `but`.

        Raises:
            StorageError: A file cannot be removed.
        """
        self._remove(path for path in self._paths() if path != but)

    def _remove(self, paths: Iterable[Path]) -> None:
        for path in paths:
            with _storage_errors(path, "removed"):
                path.unlink()

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("*.pt"), reverse=True)


class _Hashed:
    """A file for `torch.save`, which only writes in order, and hides an error of the file behind one of its own."""

    def __init__(self, file: BinaryIO) -> None:
        self.sha256 = hashlib.sha256()
        self._file = file
        self._failure: OSError | None = None
        self._size = 0

    def add(self, part: Any) -> int:
        """Write a part, tensor by tensor; return its size in bytes."""
        before = self._size
        torch.save(part, cast(BinaryIO, self))
        self.raise_failure()
        return self._size - before

    def write(self, data: bytes) -> int:
        """Write a part, unless a part before could not be written."""
        self.sha256.update(data)
        self._size += len(data)
        if self._failure is None:
            try:
                self._file.write(data)
            except OSError as error:
                self._failure = error
        return len(data)

    def flush(self) -> None:
        """Leave that to the file's owner."""

    def raise_failure(self) -> None:
        """Raise the error of the first write that failed."""
        if self._failure is not None:
            raise self._failure


@contextlib.contextmanager
def _storage_errors(path: Path, done: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path}: cannot be {done}: {error.strerror}") from error


def _read(path: Path) -> dict[str, Any] | str:
    """Return the content of a checkpoint, or a message that says why the file cannot be used."""
    try:
        with path.open("rb") as file:
            title, hashed = file.readline(_LINE).removesuffix(b"\n"), file.readline(_LINE).split()
            if not title.startswith(_TITLE):
                return "is no checkpoint of this program, or its beginning is damaged"
            if title != _TITLE + str(FORMAT).encode():
                number = title.removeprefix(_TITLE).decode(errors="replace")[:20]
                return f"is of format {number}, and this version reads format {FORMAT}"
            payload = file.tell()
            if [hashlib.file_digest(file, "sha256").hexdigest().encode()] != hashed[:1]:
                return "is damaged: its content is not what was written"
            file.seek(-int(hashed[1]), os.SEEK_END)
            sizes = json.loads(file.read())
            file.seek(payload)
            content, *states = (_load_part(file, size) for size in sizes)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except (pickle.UnpicklingError, RuntimeError) as error:
        return f"cannot be loaded: {str(error).splitlines()[0]}"
    return {**content, STATES: {number: state for part in states for number, state in part.items()}}


def _load_part(file: BinaryIO, size: int) -> dict[str, Any]:
    part: dict[str, Any] = torch.load(io.BytesIO(file.read(size)), weights_only=True, map_location="cpu")
    return part
