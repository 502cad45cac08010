"""`mlruns/optuna.db`: opened by path, also where nothing can be written, and watched while a search writes to it."""

from __future__ import annotations

import contextlib
import gc
import os
import shlex
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import RDBStorage
from sqlalchemy import text

from pipeline.errors import InvalidInput, Problem, StorageError
from pipeline.files.locks import refuse_links
from pipeline.files.sqlite import create_whole, file_identity, read_only_uri, sqlite_uri, wait_until_unlocked
from pipeline.study.stored_trial import NUMBER, OWN_TRIAL
from pipeline.study.study import storage_errors

COUNT = f"""
SELECT studies.study_name, COUNT(DISTINCT COALESCE(number.value_json, trials.trial_id))
FROM studies
JOIN trials ON trials.study_id = studies.study_id
JOIN trial_user_attributes AS own ON own.trial_id = trials.trial_id AND own.key = '{OWN_TRIAL}'
LEFT JOIN trial_user_attributes AS number ON number.trial_id = trials.trial_id AND number.key = '{NUMBER}'
GROUP BY studies.study_name
"""
"""Counts a copy of a trial once; trials of earlier versions have no number."""


class Database:
    """Optuna's database of a root.

    Args:
        root: Folder that holds `mlruns/`.
        warn: Takes one sentence for people when the database is waited for.
    """

    def __init__(self, root: Path, *, warn: Callable[[str], None]) -> None:
        self.root = root
        self.path = root / "mlruns" / "optuna.db"
        self._warn = warn
        self._storage: RDBStorage | None = None  # kept, since opening it takes longer than storing a trial
        self._opened: tuple[int, int] | None = None

    def storage(self, *, create: bool = False) -> RDBStorage:
        """Open the database; create it in the journal mode in which others can read while a search writes.

        Raises:
            InvalidInput: The file is no database of this version of Optuna, or a link.
            StorageError: Another program has locked it, or this file system has no locks.
        """
        refuse_links(self.root, self.path)
        with _readable(self.path):
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

    def studies(self) -> dict[str, Mapping[str, Any]]:
        """Return the user attributes of every study by its name, including other programs' studies."""
        with _readable(self.path):
            # Optuna's summaries would read every trial of every study.
            return {study.study_name: study.user_attrs for study in self.storage().get_all_studies()}

    def is_empty(self, study: str) -> bool:
        """Return whether a study has no trial."""
        with _readable(self.path):
            return self.storage().get_n_trials(self.storage().get_study_id_from_name(study)) == 0

    def count_trials(self) -> dict[str, int]:
        """Return the number of trials that searches have stored, by study; other programs' trials do not count."""
        with _readable(self.path), self.storage().engine.connect() as connection:
            return {name: count for name, count in connection.execute(text(COUNT))}

    def before_write(self) -> None:
        """Wait while another program has locked the database.

        Raises:
            StorageError: The database is not the one that was opened: what is written would be lost.
        """
        if self._opened is None or file_identity(self.path) != self._opened:
            remedy = "put it back; without it, the same command begins the study anew"
            raise StorageError(f"{self.path} was removed or replaced by another program meanwhile; {remedy}")
        with storage_errors(f"waiting for {self.path}"):
            wait_until_unlocked(self.path, on_wait=self._say_locked)

    def close(self) -> None:
        """Close the database; SQLite then moves the write-ahead log into the database file."""
        if self._storage is not None:
            self._storage.remove_session()
            self._storage.engine.dispose()
            self._storage = None

    def _say_locked(self) -> None:
        self._warn(f"{self.path} is locked by another program; the search waits until it is unlocked")


@contextlib.contextmanager
def garbage_kept() -> Iterator[None]:
    """Pause Python's garbage collection, which takes as long as reading where a hundred thousand objects stay."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def build_database(path: Path) -> None:
    """Create Optuna's tables."""
    RDBStorage(sqlite_uri(path)).engine.dispose()


@contextlib.contextmanager
def _readable(database: Path) -> Iterator[None]:
    """Turn an error of opening a database into one with a remedy."""
    try:
        with storage_errors("opening"):
            yield
    except RuntimeError as error:  # Optuna's, about the version of its tables
        command = f"optuna storage upgrade --storage {shlex.quote(sqlite_uri(database))}"
        later = f"Optuna {optuna.__version__} does not know them; install the Optuna that made them"
        remedy = f"copy the file, then run `{command}`" if "storage upgrade" in str(error) else later
        message = f"has tables of another version of Optuna: {remedy}, or name another --root"
        raise InvalidInput(str(database), [Problem("", message)]) from None
    except StorageError as error:
        if "database is locked" in str(error):
            raise StorageError(f"{database} is locked by another program; wait until it is unlocked") from None
        message = f"cannot be used as Optuna's database: {error}; move it away, or name another --root"
        raise InvalidInput(str(database), [Problem("", message)]) from None
