"""MLflow's store: the database of a root folder, or the server of MLFLOW_TRACKING_URI."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlparse

from pipeline.errors import InvalidInput, Problem
from pipeline.files.sqlite import create_whole, open_existing, sqlite_uri
from pipeline.tracking.paths import relocate

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    # MLflow's own 7 retries of 120 s keep a search waiting for minutes at its end when the server is away.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
"""Defaults; variables that the user set are kept."""
MAX_RUNS = 500
"""Runs that one call of `mlflow gc` deletes; a command line has room for the ids of so many."""


def remote_uri() -> str | None:
    """Return MLFLOW_TRACKING_URI, the store that the user chose in place of the root folder, if it is set."""
    return os.environ.get("MLFLOW_TRACKING_URI") or None


def refuse_broken(root: Path) -> None:
    """Refuse a `mlflow.db` that cannot be used.

    Raises:
        InvalidInput: SQLite cannot read the file, or it is a link to nothing, which a new database would replace.
    """
    database = root / "mlflow.db"
    if remote_uri() or not os.path.lexists(database):
        return
    try:
        _try(database)
    except sqlite3.Error as error:
        message = f"cannot be used as MLflow's database: {error}; move it away, or name another --root"
        raise InvalidInput(str(database), [Problem("", message)]) from None


def load_mlflow() -> None:
    """Import the parts of MLflow that write a study, which takes seconds."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient  # noqa: F401
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore  # noqa: F401


def open_store(root: Path) -> MlflowClient:
    """Open the store, after creating the database if it is missing."""
    load_mlflow()
    logging.getLogger("alembic").setLevel(logging.WARNING)
    from mlflow import MlflowClient

    if remote := remote_uri():
        return MlflowClient(remote)
    database = root / "mlflow.db"
    if not database.exists():
        create_whole(database, _build_database)
    _try(database)
    relocate(database)
    return MlflowClient(sqlite_uri(database))


def find_runs(client: MlflowClient, experiments: Sequence[str], condition: str, *, view: int) -> Iterator[Run]:
    """Yield the runs of experiments, given by their ids, that fulfil a condition; `view` says whether also deleted."""
    token = None
    while True:
        page = client.search_runs(list(experiments), condition, view, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def milliseconds(seconds: float) -> int:
    """Return a time as MLflow takes it."""
    return int(seconds * 1000)


def collect_garbage(root: Path, deleted: Sequence[Run]) -> None:
    """Remove deleted runs from the database, and their files."""
    uri = sqlite_uri(root / "mlflow.db")
    command = [sys.executable, "-m", "mlflow", "gc", "--backend-store-uri", uri, "--tracking-uri", uri]
    for start in range(0, len(deleted), MAX_RUNS):
        runs = ",".join(run.info.run_id for run in deleted[start : start + MAX_RUNS])
        subprocess.run([*command, "--run-ids", runs], check=True, capture_output=True)
    for run in deleted:
        with contextlib.suppress(OSError):  # MLflow leaves the folder, empty
            Path(unquote(urlparse(run.info.artifact_uri).path)).parent.rmdir()


def _try(database: Path) -> None:
    """Raise SQLite's error for a file that is no database; MLflow would try for minutes to open the file."""
    try:
        with contextlib.closing(open_existing(database, patience=0)) as connection:
            connection.execute("PRAGMA schema_version")
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:  # a database that another process has locked
            raise


def _build_database(database: Path) -> None:
    """Create MLflow's tables."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    # The experiment "Default", which MLflow makes here, would otherwise point below the working folder.
    store = SqlAlchemyStore(sqlite_uri(database), str(database.parent / "mlruns"))  # type: ignore[no-untyped-call]
    store.engine.dispose()
