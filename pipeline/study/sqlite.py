"""`mlruns/optuna.db`: opened by path, also where nothing can be written, and watched while a search writes to it."""

from __future__ import annotations

import contextlib
import os
import shlex
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

from optuna.storages import RDBStorage

from pipeline.errors import InvalidInput, Problem, StorageError
from pipeline.files.locks import refuse_links
from pipeline.files.sqlite import create_whole, file_identity, read_only_uri, sqlite_uri, wait_until_unlocked
from pipeline.study.database import NEWER_OPTUNA, Database, T, storage_errors


class SqliteDatabase(Database):
    """Optuna's database of a root.

    Args:
        root: Folder that holds `mlruns/`.
        warn: Takes one sentence for people when the database is waited for.
    """

    option = "--root"

    def __init__(self, root: Path, *, warn: Callable[[str], None]) -> None:
        self.root = root
        self.path = root / "mlruns" / "optuna.db"
        self.name = str(self.path)
        self._warn = warn
        self._storage: RDBStorage | None = None  # kept, since opening it takes longer than storing a trial
        self._opened: tuple[int, int] | None = None

    def exists(self) -> bool:
        """Return whether there is a file, which must be a database."""
        return self.path.exists()

    def storage(self, *, create: bool = False) -> RDBStorage:
        """Open the database; create it in the journal mode in which others can read while a search writes.

        Raises:
            InvalidInput: The file is no database of this version of Optuna, or a link.
            StorageError: Another program has locked it, or this file system has no locks.
        """
        refuse_links(self.root, self.path)
        with self.usable():
            if create:
                create_whole(self.path, build_database)
                with contextlib.closing(sqlite3.connect(self.path)) as connection:
                    connection.execute("PRAGMA journal_mode=WAL")
            if self._storage is None:
                writable = all(os.access(place, os.W_OK) for place in (self.path, self.path.parent))
                uri = sqlite_uri(self.path) if writable else read_only_uri(self.path)
                # Without Optuna's creation of tables: they would end up in a database of another program.
                self._storage = RDBStorage(uri, skip_table_creation=True)
                self._opened = file_identity(self.path)
            return self._storage

    def attempt(self, action: Callable[[], T]) -> T:
        """Return what an action returns."""
        return action()

    def write(self, doing: str, action: Callable[[], object], *, arrived: Callable[[], bool] | None = None) -> None:
        """Wait while another program has locked the database, then call an action, which does all or nothing.

        Raises:
            StorageError: The file cannot be written, or is not the one that was opened: what is written would be lost.
        """
        if self._opened is None or file_identity(self.path) != self._opened:
            remedy = "put it back; without it, the same command begins the study anew"
            raise StorageError(f"{self.path} was removed or replaced by another program meanwhile; {remedy}")
        while True:
            with storage_errors(f"waiting for {self.path}"):
                wait_until_unlocked(self.path, on_wait=self._say_locked)
            try:
                with storage_errors(doing):
                    action()
                return
            except StorageError as error:
                if "database is locked" not in str(error):  # since the wait
                    raise

    def lock(self, study: str) -> contextlib.AbstractContextManager[None]:
        """Hold nothing: the lock in the study's folder is enough, since the database is below the same root."""
        return contextlib.nullcontext()

    def close(self) -> None:
        """Close the database; SQLite then moves the write-ahead log into the database file."""
        if self._storage is not None:
            self._storage.remove_session()
            self._storage.engine.dispose()
            self._storage = None

    @contextlib.contextmanager
    def usable(self) -> Iterator[None]:
        """Turn an error of opening or reading the database into one with a remedy."""
        try:
            with storage_errors("opening"):
                yield
        except RuntimeError as error:  # Optuna's, about the version of its tables
            command = f"optuna storage upgrade --storage {shlex.quote(sqlite_uri(self.path))}"
            remedy = f"copy the file, then run `{command}`" if "storage upgrade" in str(error) else NEWER_OPTUNA
            message = f"has tables of another version of Optuna: {remedy}, or name another --root"
            raise InvalidInput(self.name, [Problem("", message)]) from None
        except StorageError as error:
            if "database is locked" in str(error):
                raise StorageError(f"{self.path} is locked by another program; wait until it is unlocked") from None
            message = f"cannot be used as Optuna's database: {error}; move it away, or name another --root"
            raise InvalidInput(self.name, [Problem("", message)]) from None

    def _say_locked(self) -> None:
        self._warn(f"{self.path} is locked by another program; the search waits until it is unlocked")


def build_database(path: Path) -> None:
    """Create Optuna's tables."""
    RDBStorage(sqlite_uri(path)).engine.dispose()
