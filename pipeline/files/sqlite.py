"""Open and create SQLite databases by path."""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
from collections.abc import Callable
from pathlib import Path

from pipeline.files.locks import folder_locked


def sqlite_uri(path: Path) -> str:
    """Return the URI of a database for SQLAlchemy, which Optuna and MLflow use: `?`, `#` and `%` are escaped."""
    from sqlalchemy import URL

    return URL.create("sqlite", database=str(path.resolve())).render_as_string(hide_password=False)


def read_only_uri(path: Path) -> str:
    """Return the URI of a database for SQLAlchemy where nothing can be written, as in another user's folder.

    SQLite reads a database with a write-ahead log only beside the log's index. Without a log, SQLite would make both,
    unless the database is called immutable.
    """
    how = "mode=ro" if path.with_name(f"{path.name}-wal").exists() else "immutable=1"
    return f"sqlite:///{path.resolve().as_uri()}?{how}&uri=true"


def wait_until_unlocked(database: Path, *, on_wait: Callable[[], None]) -> None:
    """Wait while another program has locked a database for writing.

    Args:
        database: Path of an existing database.
        on_wait: Called once if the database is locked for a second.

    Raises:
        sqlite3.Error: SQLite cannot open or write the file.
    """
    with contextlib.closing(open_existing(database, patience=1.0)) as connection:
        for attempt in itertools.count():
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                    raise
                if attempt == 0:
                    on_wait()
            else:
                connection.rollback()
                return


def open_existing(database: Path, *, patience: float = 5.0) -> sqlite3.Connection:
    """Open an existing database.

    The connection may write, because SQLite must be able to undo a transaction that a kill cut short.

    Args:
        database: Path of the file.
        patience: Seconds to wait while another process has locked the database.

    Raises:
        sqlite3.Error: SQLite cannot open the file.
    """
    return sqlite3.connect(f"{database.absolute().as_uri()}?mode=rw", timeout=patience, uri=True)


def file_identity(path: Path) -> tuple[int, int] | None:
    """Return what differs between two files that have had one path; None if there is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def create_whole(database: Path, build: Callable[[Path], object]) -> None:
    """Create a database whole or not at all, unless it exists; if several processes try at once, one creates it.

    A process killed in the middle of MLflow's migrations, or two processes that migrate at once, would leave a file
    that nothing can repair.

    Args:
        database: Path of the database.
        build: Creates the database at the path that it is given, and closes it.
    """
    with folder_locked(database.parent):
        if database.exists():
            return
        new = database.with_name(f".{database.name}.new")
        # Files of a killed process, and logs of a removed database, which SQLite would replay into the new one.
        for left in (new, *_logs(new), *_logs(database)):
            left.unlink(missing_ok=True)
        build(new)
        new.replace(database)


def _logs(database: Path) -> list[Path]:
    return [database.with_name(f"{database.name}-{kind}") for kind in ("wal", "shm", "journal")]
