"""SQLite databases by their paths."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

from pipeline.files.locks import folder_locked


def sqlite_uri(path: Path) -> str:
    """Return the URI of a database as SQLAlchemy, and so Optuna and MLflow, read it: `?`, `#` and `%` escaped."""
    from sqlalchemy import URL

    return URL.create("sqlite", database=str(path.resolve())).render_as_string(hide_password=False)


def open_existing(database: Path, *, patience: float = 5.0) -> sqlite3.Connection:
    """Open a database that is there; not read-only, which could not undo a transaction that a kill cut short.

    Args:
        database: Its file.
        patience: Seconds to wait for another process that holds it.

    Raises:
        sqlite3.Error: SQLite cannot open it.
    """
    return sqlite3.connect(f"{database.absolute().as_uri()}?mode=rw", timeout=patience, uri=True)


def create_whole(database: Path, build: Callable[[Path], object]) -> None:
    """Create a database that is not there, whole or not at all: of several processes at once, one does it.

    Half of MLflow's migrations, or two of them at once, leave a file that nothing mends.

    Args:
        database: Where it will be.
        build: Makes it at another place, and closes it.
    """
    with folder_locked(database.parent):
        if database.exists():
            return
        new = database.with_name(f".{database.name}.new")
        # What a killed process left, and the log of a database that someone removed, which the new one would replay.
        for left in (new, *_logs(new), *_logs(database)):
            left.unlink(missing_ok=True)
        build(new)
        new.replace(database)


def _logs(database: Path) -> list[Path]:
    return [database.with_name(f"{database.name}-{kind}") for kind in ("wal", "shm", "journal")]
