"""MLflow's store: the database of a root folder, or the server of MLFLOW_TRACKING_URI."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import InvalidInput, Problem, StorageError
from pipeline.files.locks import refuse_links
from pipeline.files.sqlite import create_whole, open_existing, sqlite_uri
from pipeline.tracking.paths import relocate

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run


ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    # MLflow's own 7 retries of 120 s keep a search waiting for minutes at its end when the server is away.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
"""Defaults; variables that the user set are kept."""


def remote_uri() -> str | None:
    """Return MLFLOW_TRACKING_URI, the store that the user chose in place of the root folder, if it is set."""
    return os.environ.get("MLFLOW_TRACKING_URI") or None


def refuse_broken(root: Path) -> None:
    """Refuse a `mlflow.db` that cannot be used.

    Raises:
        InvalidInput: SQLite cannot read the file, or it or the folder of artifacts is a link.
    """
    if remote_uri():
        return
    database = root / "mlflow.db"
    refuse_links(root, database, root / "mlruns" / "artifacts")
    if not database.exists():
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


def find_runs(client: MlflowClient, experiment: Experiment, condition: str, *, view: int) -> Iterator[Run]:
    """Yield the runs of an experiment that fulfil a condition; `view` says whether deleted runs are included."""
    token = None
    while True:
        page = client.search_runs([experiment.experiment_id], condition, view, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def refuse_outside(root: Path, *uris: str) -> None:
    """Refuse places of artifacts that are not below `root/mlruns`; a database may come from anyone.

    Raises:
        StorageError: An artifact would be written outside the root.
    """
    for uri in uris:
        if not _is_below(root, uri):
            remedy = "rename that experiment, or set MLFLOW_TRACKING_URI to this store to use it as it is"
            raise StorageError(f"the database keeps artifacts outside the root, in {uri}; {remedy}")


def remove_runs(root: Path, runs: Sequence[Run]) -> list[str]:
    """Remove runs from the database of a root, and their files below `root/mlruns`; return which files are left.

    `mlflow gc` would also remove experiments and models that others have deleted and may restore, and folders outside
    the root.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from mlflow.utils.file_utils import local_file_uri_to_path

    store: Any = SqlAlchemyStore(sqlite_uri(root / "mlflow.db"), str(root / "mlruns"))  # type: ignore[no-untyped-call]
    left = []
    for run in runs:
        store._hard_delete_run(run.info.run_id)
        uri, folder = run.info.artifact_uri, Path(local_file_uri_to_path(run.info.artifact_uri)).parent
        if _is_below(root, uri) and folder.name == run.info.run_id and re.fullmatch("[0-9a-f]{32}", folder.name):
            shutil.rmtree(folder, ignore_errors=True)
        else:
            left.append(uri)
    store.engine.dispose()
    return left


def _is_below(root: Path, uri: str) -> bool:
    """Return whether a place of artifacts is a folder below `root/mlruns`, wherever links lead."""
    from mlflow.utils.file_utils import local_file_uri_to_path
    from mlflow.utils.uri import is_local_uri

    mlruns = root.resolve() / "mlruns"
    return is_local_uri(uri) and mlruns in Path(local_file_uri_to_path(uri)).resolve().parents


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
