"""The record in a PostgreSQL server, which may be away for minutes, and to which other machines write too.

One connection reads and writes, and the same connection holds the lock of the study. `_connect` alone replaces it: a
new connection takes the lock first, and the server gives the lock only once the earlier connection has ended, with its
last transaction. So nothing is written without the lock, and what an earlier connection has written is known.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import sqlalchemy
from optuna.storages import RDBStorage

from pipeline.errors import InvalidInput, PipelineError, Problem, StorageError, StudyBusy, first_line
from pipeline.files.postgres import DEFAULTS, STORAGE, connection_parameters
from pipeline.study.database import NEWER_OPTUNA, Database, T, storage_errors

PATIENCE_S = 1800.0
"""Seconds for which a search waits for its database."""
RETRY_S = 1.0
"""Seconds between two attempts to connect."""
LOCK_S = 1.0
"""Seconds for which a killed search may still seem to hold its lock."""
DRIVER = "postgresql+psycopg://"
"""A URL for SQLAlchemy that names the driver alone, since connections are made here."""
KEEPALIVES = (
    "SELECT set_config('tcp_keepalives_idle', '30', false), set_config('tcp_keepalives_interval', '10', false),"
    " set_config('tcp_keepalives_count', '3', false)"
)
"""Has the server notice within a minute that this machine is gone, and free the lock."""
KEY = "hashtextextended(coalesce(current_schema(), '') || '.' || %(study)s, 0)"
"""Number of the lock of a study."""
HOLDER = f"""
SELECT activity.pid, activity.backend_start, activity.application_name
FROM pg_locks AS locks
JOIN pg_stat_activity AS activity USING (pid)
JOIN pg_database AS here ON here.oid = locks.database AND here.datname = current_database()
WHERE locks.locktype = 'advisory' AND locks.granted AND locks.objsubid = 1
    AND (locks.classid::bigint << 32) | locks.objid::bigint = {KEY}
"""
OWN_SESSION = "SELECT pid, backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid()"
TABLES = "SELECT to_regclass('studies') IS NOT NULL, to_regclass('alembic_version') IS NOT NULL"
BUILDING = 4_771_960
"""Number of the lock under which Optuna's tables are created."""


class PostgresDatabase(Database):
    """Optuna's tables in a PostgreSQL database.

    Args:
        url: As `pipeline.files.postgres.read_url` returns it: without a password, which libpq finds in PGPASSWORD or
            .pgpass.
        warn: Takes one sentence for people when the database is waited for.
    """

    option = f"--storage or {STORAGE}"

    def __init__(self, url: str, *, warn: Callable[[str], None]) -> None:
        self.name = url
        self._warn = warn
        self._parameters = DEFAULTS | connection_parameters(url)
        self._address = ""
        self._storage: RDBStorage | None = None
        self._study: str | None = None
        """The study whose lock each connection takes."""
        self._connection: psycopg.Connection[Any] | None = None
        self._sessions: set[tuple[Any, ...]] = set()
        """Of each connection, the number of the server's process, and the time of its beginning."""
        self._untaken: psycopg.Connection[Any] | None = None
        """The connection until SQLAlchemy's pool has taken it."""

    def exists(self) -> bool:
        """Return whether there are Optuna's tables.

        Raises:
            InvalidInput: The database has the tables of another program.
        """
        with self.usable():
            studies, versions = self.attempt(lambda: self._ask(TABLES))
        if versions and not studies:
            message = "has tables of another program, such as MLflow; name another database, which `createdb` makes"
            raise InvalidInput(self.option, [Problem(self.name, message)])
        return bool(studies and versions)

    def storage(self, *, create: bool = False) -> RDBStorage:
        """Open the database; create Optuna's tables if asked to.

        Raises:
            InvalidInput: The server cannot be reached, or the tables are of another version of Optuna.
            StorageError: The tables cannot be created.
        """
        if self._storage is None:
            with self.usable():
                if create and not self.exists():
                    self.attempt(self._build)
                self._storage = self.attempt(self._opened)
        return self._storage

    def attempt(self, action: Callable[[], T]) -> T:
        """Return what an action returns; if the connection breaks, connect and call the action again.

        Raises:
            StorageError: The database has been away for too long.
            StudyBusy: Another program took the study's lock while the database was away.
        """
        self._ensure_connected()
        away_since: float | None = None
        while True:
            try:
                return action()
            except PipelineError:
                raise
            except Exception:
                if self._is_connected() or (away_since and time.monotonic() - away_since > PATIENCE_S):
                    raise
            if away_since is not None:  # it has broken again
                time.sleep(RETRY_S)
            away_since = away_since or time.monotonic()
            self._connect_again(away_since)

    def write(self, doing: str, action: Callable[[], object], *, arrived: Callable[[], bool] | None = None) -> None:
        """Call an action that changes the database; if the connection breaks, call it again unless it has arrived.

        Raises:
            StorageError: The database cannot be written, or has been away for too long.
            StudyBusy: Another program took the study's lock while the database was away.
        """
        calls = 0

        def once() -> None:
            nonlocal calls
            calls += 1
            if calls == 1 or arrived is None or not arrived():
                action()

        with storage_errors(doing):
            self.attempt(once)

    @contextlib.contextmanager
    def lock(self, study: str) -> Iterator[None]:
        """Hold the lock of a study, with this connection and each that replaces it, until the block ends.

        Raises:
            StudyBusy: A program, here or on another machine, holds the lock.
        """
        self._study = study
        self._hang_up()
        try:
            self._ensure_connected()
            yield
        finally:
            self._study = None
            self._hang_up()

    def close(self) -> None:
        """Close the connection."""
        self._hang_up()
        if self._storage is not None:
            self._storage.remove_session()
            self._storage.engine.dispose()
            self._storage = None

    @contextlib.contextmanager
    def usable(self) -> Iterator[None]:
        """Turn an error of the server into a StorageError that names the database."""
        with storage_errors(self.name):
            try:
                yield
            except psycopg.Error as error:
                raise StorageError(f"{self.name}: {_reason(error)}") from error

    def _opened(self) -> RDBStorage:
        """Return Optuna's storage, whose pool has this one connection.

        Raises:
            InvalidInput: The tables are of another version of Optuna.
        """
        storage = RDBStorage(
            DRIVER,
            # A connection that has broken is noticed before it is used, and `_take` gives no other in its place.
            {"creator": self._take, "pool_pre_ping": True, "pool_size": 1, "max_overflow": 0},
            skip_compatibility_check=True,  # which takes a second connection
            skip_table_creation=True,
        )
        if (version := storage.get_current_version()) != storage.get_head_version():
            command = f"optuna storage upgrade --storage {shlex.quote(self.name.replace('postgresql://', DRIVER))}"
            known = version in storage.get_all_versions()
            remedy = f"copy the database, then run `{command}`" if known else NEWER_OPTUNA
            message = f"has tables of another version of Optuna: {remedy}, or name another --storage"
            raise InvalidInput(self.option, [Problem(self.name, message)])
        return storage

    def _build(self) -> None:
        """Create Optuna's tables; if several programs try at once, one after the other.

        Raises:
            StorageError: The user is not allowed to.
        """
        with psycopg.connect(**self._parameters, autocommit=True) as connection:
            connection.execute("SELECT pg_advisory_lock(%s)", [BUILDING])
            pool = {"creator": lambda: psycopg.connect(**self._parameters), "poolclass": sqlalchemy.NullPool}
            try:
                RDBStorage(DRIVER, pool).engine.dispose()
            except sqlalchemy.exc.ProgrammingError as error:
                message = f"{self.name}: Optuna's tables cannot be made: {first_line(error.orig or error)}"
                raise StorageError(f"{message}; allow it by GRANT CREATE ON SCHEMA") from error

    def _take(self) -> psycopg.Connection[Any]:
        """Give SQLAlchemy's pool the connection, once: Optuna would otherwise repeat what may have been done."""
        if self._untaken is None:
            raise _ConnectionLost
        connection, self._untaken = self._untaken, None
        return connection

    def _ask(self, query: str) -> tuple[Any, ...]:
        assert self._connection is not None
        try:
            row: tuple[Any, ...] | None = self._connection.execute(query).fetchone()
        finally:
            if not self._connection.closed:
                self._connection.rollback()
        assert row is not None
        return row

    def _is_connected(self) -> bool:
        with contextlib.suppress(psycopg.Error):
            assert self._connection is not None
            self._connection.rollback()
            self._ask("SELECT 1")
            return True
        return False

    def _ensure_connected(self) -> None:
        """Connect, if this was not done before.

        Raises:
            InvalidInput: The server cannot be reached.
        """
        if self._connection is not None:
            return
        if self._sessions:
            self._connect_again(time.monotonic())
            return
        try:
            self._connect()
        except psycopg.OperationalError as error:
            raise InvalidInput(self.option, [Problem(self.name, f"{_reason(error)}; {_remedy(error)}")]) from None

    def _connect_again(self, away_since: float) -> None:
        """Connect; wait while the database is away.

        Raises:
            StorageError: The database has been away for too long, or the wait was interrupted.
            StudyBusy: Another program holds the lock of the study.
        """
        self._hang_up()
        waiting = False
        while True:
            try:
                self._connect()
            except psycopg.OperationalError as error:
                reason = _reason(error)
            else:
                break
            if not waiting:
                waiting = True
                limit = f"for {PATIENCE_S / 60:g} minutes at most"
                self._warn(f"waiting for the database at {self._address}, {limit}: {reason}")
            away = f"the database at {self._address} is away"
            if self.interrupted():
                raise StorageError(f"interrupted while {away}: {reason}")
            if time.monotonic() - away_since > PATIENCE_S:
                raise StorageError(f"{away} for more than {PATIENCE_S / 60:g} minutes: {reason}")
            time.sleep(RETRY_S)
        if waiting:
            seconds = round(time.monotonic() - away_since)
            self._warn(f"the database at {self._address} is back after {seconds} s")

    def _connect(self) -> None:
        """Connect, and take the lock of the study, if there is one.

        Raises:
            psycopg.OperationalError: The server cannot be reached now.
            StudyBusy: Another program holds the lock.
        """
        words = f"process {os.getpid()} on {socket.gethostname()}"
        parameters = {"fallback_application_name": words, **self._parameters}
        connection = psycopg.connect(**parameters, autocommit=True)
        try:
            connection.execute(KEEPALIVES)
            self._sessions.update(connection.execute(OWN_SESSION))
            if self._study is not None:
                self._take_lock(connection, self._study)
            connection.autocommit = False
        except BaseException as error:
            connection.close()
            if isinstance(error, psycopg.Error) and not isinstance(error, psycopg.OperationalError):
                raise StorageError(f"{self.name}: {_reason(error)}") from error
            raise
        self._address = f"{connection.info.host}:{connection.info.port}"
        self._connection = self._untaken = connection

    def _take_lock(self, connection: psycopg.Connection[Any], study: str) -> None:
        try:
            connection.execute(f"SET lock_timeout = {LOCK_S * 1000:.0f}")
            connection.execute(f"SELECT pg_advisory_lock({KEY})", {"study": study})
            connection.execute("RESET lock_timeout")
        except psycopg.errors.LockNotAvailable as error:
            holder = connection.execute(HOLDER, {"study": study}).fetchone()
            if holder is not None and holder[:2] not in self._sessions:
                remedy = "wait for it, or name another --study"
                raise StudyBusy(f"study {study} is driven by {holder[2] or 'another program'}; {remedy}") from None
            if holder is not None:  # the server has not noticed yet that the earlier connection broke
                connection.execute("SELECT pg_terminate_backend(%s)", holder[:1])
            raise psycopg.OperationalError("the lock of the study is not free yet") from error

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = self._untaken = None


class _ConnectionLost(Exception):
    """The connection broke while an action used it."""


def _reason(error: psycopg.Error) -> str:
    """Return why the server answered so, without libpq's words about how it was reached."""
    return first_line(error).rpartition(" failed: ")[2].removeprefix("FATAL:").strip()


def _remedy(error: psycopg.Error) -> str:
    """Return what a person may do who could not connect for the first time."""
    said = str(error)
    if "password" in said:
        return "set PGPASSWORD, or write the password into ~/.pgpass"
    if "database" in said and "does not exist" in said:
        return "make it with `createdb`, or name another database"
    return "start the server, or name another --storage"
