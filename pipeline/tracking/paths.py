"""Correct the absolute paths of artifacts in MLflow's database after the root folder was moved or copied."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote

PATH_COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Tables and columns of MLflow's database that hold absolute paths of artifacts."""


def relocate(database: Path) -> None:
    """Replace the path of an `mlruns` folder that used to lie beside the database by the path of today's.

    An experiment stays where it is if its folder exists at the stored path and not beside the database: someone put
    the experiment there on purpose.
    """
    with closing(sqlite3.connect(database)) as connection, connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
        if not tables >= {table for table, _ in PATH_COLUMNS}:
            return  # MLflow will refuse this database: another version's, or not MLflow's
        for (location,) in connection.execute("SELECT artifact_location FROM experiments").fetchall():
            if (here := _here(location, database.absolute().parent)) is None:
                continue
            for table, column in PATH_COLUMNS:
                connection.execute(
                    f"UPDATE {table} SET {column} = :here || substr({column}, :rest) "
                    f"WHERE {column} = :there OR substr({column}, 1, :rest) = :there || '/'",
                    {"here": here, "there": location, "rest": len(location) + 1},
                )


def _here(location: str, root: Path) -> str | None:
    """Return where an experiment's artifacts are now, or None if the stored location is right."""
    match = re.fullmatch(r"(file://)?(/.*|)/mlruns/((?:artifacts/)?[^/]+)", location)
    if match is None:
        return None
    scheme, _, rest = match.groups()
    there = Path(unquote(location.removeprefix("file://")) if scheme else location)
    here = root / "mlruns" / (unquote(rest) if scheme else rest)
    if there == here or (there.exists() and not here.exists()) or (there.exists() and there.samefile(here)):
        return None
    return here.as_uri() if scheme else str(here)
