"""SQLite databases by their paths."""

from __future__ import annotations

from pathlib import Path


def sqlite_uri(path: Path) -> str:
    """Return the URI of a database as SQLAlchemy, and so Optuna and MLflow, read it: `?`, `#` and `%` escaped."""
    from sqlalchemy import URL

    return URL.create("sqlite", database=str(path.resolve())).render_as_string(hide_password=False)
