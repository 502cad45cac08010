"""Serve MLflow's web page on the runs of a folder, and print links to the views that compare trials.

The server is MLflow's own, without its job runners: 2 processes and 0.5 GB instead of 15 processes and 3 GB.
"""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from pipeline.errors import InvalidInput, Problem
from pipeline.files.sqlite import open_existing, sqlite_uri
from pipeline.tracking.paths import relocate
from pipeline.tracking.view import runs_path, view_path

HOST = "127.0.0.1"
"""MLflow has no password: everyone who reaches the port may read and write. From another machine, use `ssh -L`."""
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "PYTHONWARNINGS": "ignore",  # deprecations within MLflow
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
LIMIT ?
"""


def serve_page(root: Path, *, port: int) -> int:
    """Print the links, run MLflow's server until it is stopped, and return the exit status.

    Raises:
        InvalidInput: There is no store, or the port is not free.
    """
    studies = check(root, port)
    address = f"http://{HOST}:{port}"
    for experiment_id, study in studies:
        print(f"{study:<16} {address}{view_path(experiment_id, study)}")
    for path in dict.fromkeys(runs_path(experiment_id) for experiment_id, _ in studies) or [""]:
        print(f"{'all runs':<16} {address}{path}")
    print("ready in about ten seconds; Ctrl-C stops it", flush=True)
    return serve(server_command(root, port))


def check(root: Path, port: int) -> list[tuple[str, str]]:
    """Return the newest studies of the store, as (experiment id, name).

    Raises:
        InvalidInput: There is no store, or the port is not free.
    """
    problems: list[Problem] = []
    studies: list[tuple[str, str]] = []
    database = root.absolute() / "mlflow.db"
    if root.exists() and not os.access(root, os.R_OK | os.X_OK):
        problems.append(Problem("--root", f"must be a folder that can be read, got {root.absolute()}"))
    elif not database.is_file():
        remedy = "search first, `python -m pipeline.search`, or name the folder of a search that ran"
        if remote := os.environ.get("MLFLOW_TRACKING_URI"):
            remedy += f"; with MLFLOW_TRACKING_URI set, runs are at {remote}"
        problems.append(Problem("--root", f"must hold an mlflow.db, got {root.absolute()}; {remedy}"))
    else:
        try:
            relocate(database)
            studies = newest_studies(database)
        except sqlite3.Error as error:
            problems.append(
                Problem(
                    "--root",
                    f"must hold MLflow's database, got {database}: {error}; move it away, or name another --root",
                )
            )
    if why := why_not_free(port):
        problems.append(
            Problem("--port", f"must be free, got {port}: {why}; choose another, such as --port {port + 1}")
        )
    if problems:
        raise InvalidInput("pipeline.ui", problems)
    return studies


def newest_studies(database: Path) -> list[tuple[str, str]]:
    """Return studies as (experiment id, name), newest first; importing MLflow for it would take seconds."""
    with closing(open_existing(database)) as connection:
        return [(str(experiment_id), study) for experiment_id, study in connection.execute(STUDIES, [MAX_STUDIES])]


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
    root = root.absolute()
    return [
        *(sys.executable, "-m", "mlflow", "ui"),
        *("--backend-store-uri", sqlite_uri(root / "mlflow.db")),
        *("--artifacts-destination", str(root / "mlruns")),
        *("--host", HOST, "--port", str(port), "--workers", "1"),
        *("--uvicorn-opts", "--log-level warning"),  # no line per request
    ]


def serve(command: Sequence[str]) -> int:
    """Run MLflow's server until it ends or this process is told to stop; return the exit status."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    # In a process group of its own: Ctrl-C in the terminal would reach each process of the server, and each would print
    # a traceback; on SIGTERM they end quietly.
    server = subprocess.Popen(command, env=ENVIRONMENT | os.environ, process_group=0)
    try:
        return server.wait()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()
        return 0
