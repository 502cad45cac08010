"""A root that was moved or copied: MLflow stores where artifacts are as absolute paths, which are corrected here."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote

PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Tables and columns of MLflow's database that hold such paths."""


def relocate(database: Path) -> None:
    """Let every artifact below an `mlruns` that used to lie beside the database be found in the one that does now.

    An experiment whose folder is at its old place, and not here, is somewhere else on purpose and stays there.
    """
    with closing(sqlite3.connect(database)) as connection, connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
        if not tables >= {table for table, _ in PLACES}:
            return  # of a version of MLflow that will refuse it, or none of MLflow's
        for (location,) in connection.execute("SELECT artifact_location FROM experiments").fetchall():
            if (here := _here(location, database.absolute().parent)) is None:
                continue
            for table, column in PLACES:
                connection.execute(
                    f"UPDATE {table} SET {column} = :here || substr({column}, :rest) "
                    f"WHERE {column} = :there OR substr({column}, 1, :rest) = :there || '/'",
                    {"here": here, "there": location, "rest": len(location) + 1},
                )


def _here(location: str, root: Path) -> str | None:
    """Return where an experiment's artifacts are now, or None if that is where they are said to be."""
    match = re.fullmatch(r"(file://)?(/.*|)/mlruns/((?:artifacts/)?[^/]+)", location)
    if match is None:
        return None
    scheme, _, rest = match.groups()
    there = Path(unquote(location.removeprefix("file://")) if scheme else location)
    here = root / "mlruns" / (unquote(rest) if scheme else rest)
    if there == here or (there.exists() and not here.exists()) or (there.exists() and there.samefile(here)):
        return None
    return here.as_uri() if scheme else str(here)
