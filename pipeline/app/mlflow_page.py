"""Serve MLflow's web page on the runs of a folder, and print links to the views that compare trials.

The server is MLflow's own, without its job runners: 2 processes and 0.5 GB instead of 15 processes and 3 GB.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import distribution
from pathlib import Path

from pipeline.errors import InvalidInput, Problem, masked, printable
from pipeline.tracking.mlflow_store import database_file, database_uri, refuse_broken, remote_uri, server_uri
from pipeline.tracking.paths import relocate
from pipeline.tracking.view import runs_path, view_path

HOST = "127.0.0.1"
"""MLflow has no password: everyone who reaches the port may read and write. From another machine, use `ssh -L`."""
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "PYTHONWARNINGS": "ignore",  # deprecations within MLflow
    "PYTHONSAFEPATH": "1",  # a file mlflow.py in the working folder is not MLflow
}
"""Defaults; variables that the user has set keep their values."""
MAX_STUDIES = 5
"""Studies whose links are printed, newest first; the page lists every study under Views."""

STUDIES = """
SELECT runs.experiment_id, study.value
FROM runs
JOIN tags AS kind ON kind.run_uuid = runs.run_uuid AND kind.key = 'hpo.kind' AND kind.value = 'study'
JOIN tags AS study ON study.run_uuid = runs.run_uuid AND study.key = 'hpo.study'
WHERE runs.lifecycle_stage = 'active'
ORDER BY runs.start_time DESC
"""


def serve_page(root: Path, *, port: int) -> int:
    """Print the links, run MLflow's server until it is stopped, and return the exit status.

    Raises:
        InvalidInput: There is no store, or the port is not free.
    """
    studies = check(root, port)
    address = f"http://{HOST}:{port}"
    for experiment_id, study in studies:
        print(printable(f"{study:<16} {address}{view_path(experiment_id, study)}"))
    for path in dict.fromkeys(runs_path(experiment_id) for experiment_id, _ in studies) or [""]:
        print(printable(f"{'all runs':<16} {address}{path}"))
    print("ready in about ten seconds; Ctrl-C stops it", flush=True)
    # A variable, since others on this machine see the command line, and the URI of a database may hold a password.
    return serve(server_command(root, port), {"MLFLOW_BACKEND_STORE_URI": database_uri(root.absolute())})


def check(root: Path, port: int) -> list[tuple[str, str]]:
    """Return the newest studies of the store, as (experiment id, name).

    Raises:
        InvalidInput: There is no store, or the port is not free.
    """
    from sqlalchemy.exc import SQLAlchemyError

    problems: list[Problem] = []
    studies: list[tuple[str, str]] = []
    database = database_file(root.absolute())
    if root.exists() and not os.access(root, os.R_OK | os.X_OK):
        problems.append(Problem("--root", f"must be a folder that can be read, got {root.absolute()}"))
    elif database and not database.is_file():
        remedy = "search first, `python -m pipeline.search`, or name the folder of a search that ran"
        if chosen := remote_uri():
            remedy += f"; with MLFLOW_TRACKING_URI set, runs are at {chosen}"
        problems.append(Problem("--root", f"must hold an mlflow.db, got {root.absolute()}; {remedy}"))
    else:
        refuse_broken(root.absolute())
        try:
            if database and (server_uri() or not remote_uri()):
                relocate(database)
            studies = newest_studies(database_uri(root.absolute()))
        except SQLAlchemyError as error:
            why = f"must be MLflow's database: {getattr(error, 'orig', error)}; name another"
            problems.append(Problem(masked(database_uri(root.absolute())), why))
    if taken := why_not_free(port):
        message = f"must be free, got {port}: {taken}; choose another, such as --port {port + 1}"
        problems.append(Problem("--port", message))
    if problems:
        raise InvalidInput("pipeline.ui", problems)
    return studies


def newest_studies(uri: str) -> list[tuple[str, str]]:
    """Return the studies of a database as (experiment id, name), newest first; importing MLflow would take seconds."""
    from sqlalchemy import create_engine, text

    engine = create_engine(uri)
    with engine.connect() as connection:
        found = connection.execute(text(STUDIES)).fetchmany(MAX_STUDIES)
    engine.dispose()
    return [(str(experiment_id), study) for experiment_id, study in found]


def why_not_free(port: int) -> str | None:
    """Return why no server can listen on a port of this machine; None if one can."""
    with socket.socket() as probe:
        probe.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # as servers do: a port that was closed a minute ago is free
        try:
            probe.bind((HOST, port))
        except OSError as error:
            return error.strerror
    return None


def server_command(root: Path, port: int) -> list[str]:
    """Return the command that serves the store of `root` with the MLflow of this Python, on this machine only."""
    app_folder = distribution("mlflow").locate_file("")  # where uvicorn looks first, by default in the working folder
    return [
        *(sys.executable, "-m", "mlflow", "ui"),
        *("--artifacts-destination", str(root.absolute() / "mlruns" / "artifacts")),
        *("--host", HOST, "--port", str(port), "--workers", "1"),
        # No line per request.
        *("--uvicorn-opts", f"--log-level warning --app-dir {shlex.quote(str(app_folder))}"),
    ]


def serve(command: Sequence[str], variables: Mapping[str, str]) -> int:
    """Run MLflow's server until it ends or this process is told to stop; return the exit status."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    # In a process group of its own: Ctrl-C in the terminal would reach each process of the server, and each would print
    # a traceback; on SIGTERM they end quietly.
    server = subprocess.Popen(command, env={**ENVIRONMENT, **os.environ, **variables}, process_group=0)
    try:
        return server.wait()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()
        return 0
