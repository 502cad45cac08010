"""MLflow's store: the database of a root folder, or the server of MLFLOW_TRACKING_URI."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
import shutil
import sqlite3
from collections.abc import Iterator, Sequence
from importlib.metadata import distribution, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pipeline.errors import InvalidInput, Problem, StorageError
from pipeline.files.locks import refuse_links
from pipeline.files.sqlite import create_whole, open_existing, sqlite_uri
from pipeline.tracking.paths import relocate

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


VARIABLE = "MLFLOW_TRACKING_URI"
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
"""Schemes of the databases that MLflow writes to without a server."""
SERVERS = ("http", "https", "databricks", "databricks-uc", "uc")
"""Schemes of the servers that MLflow writes to."""
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
    return os.environ.get(VARIABLE) or None


def server_uri() -> str | None:
    """Return MLFLOW_TRACKING_URI if it is a server, which keeps artifacts and has a page of its own."""
    uri = remote_uri()
    return None if uri is None or _scheme(uri) in DATABASES else uri


def server_page() -> str | None:
    """Return the address of the page of the server that the user chose, without a password; None if it has no page."""
    url = urlsplit(server_uri() or "")
    if url.scheme not in ("http", "https"):
        return None
    return url._replace(netloc=url.netloc.rpartition("@")[2], path=url.path.rstrip("/")).geturl()


def database_uri(root: Path) -> str:
    """Return the database of a root, or the one that the user chose in its place."""
    return (None if server_uri() else remote_uri()) or sqlite_uri(root / "mlflow.db")


def database_file(root: Path) -> Path | None:
    """Return the file of `database_uri`; None for a server of databases."""
    uri = None if server_uri() else remote_uri()
    if uri is None:
        return root / "mlflow.db"
    from sqlalchemy import make_url

    return Path(make_url(uri).database or "") if _scheme(uri) == "sqlite" else None


def refuse_broken(root: Path) -> None:
    """Refuse a store that cannot be used, without importing MLflow.

    Raises:
        InvalidInput: MLFLOW_TRACKING_URI is no store, SQLite cannot read the database, the database is of another
            version of MLflow, or the database or the folder of artifacts is a link.
    """
    uri = remote_uri()
    remedy = f"set {VARIABLE} to another" if uri else "name another --root"
    if uri and (why := _why_no_store(uri, root)):
        raise InvalidInput(VARIABLE, [Problem(uri, why)])
    if uri and server_uri():
        return
    refuse_links(root, root / "mlruns" / "artifacts")
    if not uri:
        refuse_links(root, root / "mlflow.db")
    database = database_file(root)
    if database is None or not database.exists():
        return
    try:
        _try(database)
        why = _why_other_schema(database, remedy)
    except sqlite3.Error as error:
        why = f"cannot be used as MLflow's database: {error}; move it away, or {remedy}"
    if why:
        raise InvalidInput(str(database), [Problem("", why)])


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

    if server := server_uri():
        return MlflowClient(server)
    if database := database_file(root):
        if not database.exists():
            create_whole(database, lambda path: _build_database(path, artifacts=root / "mlruns"))
        _try(database)
        if not remote_uri():
            relocate(database)
    return MlflowClient(database_uri(root))


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


def refuse_outside(root: Path, *uris: str) -> None:
    """Refuse places of artifacts outside `root/mlruns`, unless the user chose the store; one may come from anyone.

    Raises:
        StorageError: An artifact would be written outside the root.
    """
    for uri in () if remote_uri() else uris:
        path = _local_path(uri)
        if path is None or not _is_below(root, path):
            remedy = f"name another --root, or set {VARIABLE} to this store to use it as it is"
            raise StorageError(f"the database keeps artifacts outside the root, in {uri}; {remedy}")


def remove_runs(root: Path, runs: Sequence[Run]) -> list[str]:
    """Remove runs from the database of a root, and their files below `root/mlruns`; return which files are left.

    `mlflow gc` would also remove experiments and models that others have deleted and may restore, and folders outside
    the root.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    store: Any = SqlAlchemyStore(sqlite_uri(root / "mlflow.db"), str(root / "mlruns"))  # type: ignore[no-untyped-call]
    left = []
    for run in runs:
        store._hard_delete_run(run.info.run_id)
        artifacts = _local_path(run.info.artifact_uri)
        own = artifacts and artifacts.parent.name == run.info.run_id and re.fullmatch("[0-9a-f]{32}", run.info.run_id)
        if artifacts and own and _is_below(root, artifacts):
            shutil.rmtree(artifacts.parent, ignore_errors=True)
        else:
            left.append(run.info.artifact_uri)
    store.engine.dispose()
    return left


def _local_path(uri: str) -> Path | None:
    """Return the folder of artifacts as MLflow reads its URI; None if it is not on this machine."""
    from mlflow.utils.file_utils import local_file_uri_to_path
    from mlflow.utils.uri import is_local_uri

    local: bool = is_local_uri(uri)  # type: ignore[no-untyped-call]
    return Path(local_file_uri_to_path(uri)) if local else None  # type: ignore[no-untyped-call]


def _is_below(root: Path, path: Path) -> bool:
    """Return whether a path is below `root/mlruns`, wherever links lead."""
    return root.resolve() / "mlruns" in path.resolve().parents


def _scheme(uri: str) -> str:
    """Return the scheme of a URI, without the driver of a database; a path has none."""
    scheme, separator, _ = uri.partition(":")
    return scheme.partition("+")[0].lower() if separator else ""


def _why_no_store(uri: str, root: Path) -> str | None:
    """Return why a URI is no store of MLflow's, and what to set in its place; None if it may be one."""
    scheme, here = (
        _scheme(uri),
        f"unset it to use --root, or set it to a database, such as {sqlite_uri(root / 'mlflow.db')}",
    )
    if scheme in ("", "file"):
        if os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in ("true", "1"):
            return None
        source = uri.removeprefix("file://")
        copied = f"`mlflow migrate-filestore --source {shlex.quote(source)} --target sqlite:///…` copies its runs"
        return f"MLflow no longer writes to folders of files; {here}; {copied}"
    if scheme not in (*DATABASES, *SERVERS, *(plugin.name for plugin in entry_points(group="mlflow.tracking_store"))):
        return f"MLflow has no store of the scheme {scheme!r}; {here}, or to a server, such as http://127.0.0.1:5000"
    if scheme in ("http", "https") and not urlsplit(uri).hostname:
        return f"names no server; write {scheme}://host:port, or {here}"
    if scheme in DATABASES:
        from sqlalchemy import make_url
        from sqlalchemy.exc import SQLAlchemyError

        try:
            url = make_url(uri)
            url.get_dialect().import_dbapi()
        except ImportError as error:
            return f"needs the package {error.name}, which is not installed; install it, or {here}"
        except (SQLAlchemyError, ValueError) as error:
            return f"cannot be read: {error}; {here}"
        if scheme == "sqlite" and url.database in (None, "", ":memory:"):
            return f"is a database in memory, which ends with its process; {here}"
    return None


def _why_other_schema(database: Path, remedy: str) -> str | None:
    """Return why the installed MLflow would refuse the tables of a database; None if it would not."""
    with contextlib.closing(open_existing(database)) as connection:
        try:
            found = {version for (version,) in connection.execute("SELECT version_num FROM alembic_version")}
        except sqlite3.OperationalError:  # locked, or no table of that name: the tables are not made yet
            return None
    newest, earlier = _schemas()
    if not found or found == {newest}:
        return None
    if found <= earlier:
        command = f"mlflow db upgrade {shlex.quote(sqlite_uri(database))}"
        return f"is of an earlier version of MLflow; copy the file, then run `{command}`, or {remedy}"
    words = ", ".join(map(str, found))
    return (
        f"is of schema {words}, which the installed MLflow does not know; install the MLflow that made it, or {remedy}"
    )


def _schemas() -> tuple[str, set[str]]:
    """Return MLflow's newest schema and the earlier ones, read from its source: importing MLflow takes seconds."""
    versions = Path(str(distribution("mlflow").locate_file("mlflow/store/db_migrations/versions")))
    text = "\n".join(path.read_text() for path in versions.glob("*.py"))
    made, replaced = (
        set(re.findall(rf'^{name} = "(\w+)"', text, re.MULTILINE)) for name in ("revision", "down_revision")
    )
    (newest,) = made - replaced
    return newest, replaced


def _try(database: Path) -> None:
    """Raise SQLite's error for a file that is no database; MLflow would try for minutes to open the file."""
    try:
        with contextlib.closing(open_existing(database, patience=0)) as connection:
            connection.execute("PRAGMA schema_version")
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:  # a database that another process has locked
            raise


def _build_database(database: Path, *, artifacts: Path) -> None:
    """Create MLflow's tables."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    # The experiment "Default", which MLflow makes here, would otherwise point below the working folder.
    store = SqlAlchemyStore(sqlite_uri(database), str(artifacts))  # type: ignore[no-untyped-call]
    store.engine.dispose()
