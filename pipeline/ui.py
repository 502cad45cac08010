"""`python -m pipeline.ui`: MLflow's web page on this project's runs, with a link to the view that compares trials.

A bare `mlflow ui` in the same folder shows the same runs. This one prints the link, and starts 2 processes instead of
15, with 0.5 GB instead of 3, by leaving out MLflow's job runners.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from pipeline.errors import InvalidInput, PipelineError, Problem
from pipeline.files.sqlite import open_existing, sqlite_uri
from pipeline.tracking.paths import relocate
from pipeline.tracking.view import view_path

HOST = "127.0.0.1"
"""MLflow asks nobody for a password: whoever reaches the port may read and write. From afar, use `ssh -L`."""
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "PYTHONWARNINGS": "ignore",  # what its libraries deprecate is MLflow's concern
}
"""Defaults; what the user set stays."""
MAX_STUDIES = 5
"""Studies whose links are printed, newest first; the page lists all of them under Views."""

STUDIES = """
SELECT runs.experiment_id, study.value
FROM runs
JOIN tags AS kind ON kind.run_uuid = runs.run_uuid AND kind.key = 'hpo.kind' AND kind.value = 'study'
JOIN tags AS study ON study.run_uuid = runs.run_uuid AND study.key = 'hpo.study'
WHERE runs.lifecycle_stage = 'active'
ORDER BY runs.start_time DESC
LIMIT ?
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the command line, print the links, run MLflow's server and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.ui", description="Compare trials in MLflow's web page.")
    parser.add_argument("--root", type=Path, default=Path(), help="folder that holds mlflow.db (default: this one)")
    parser.add_argument("--port", type=int, default=5000, help="port on this machine (default: 5000)")
    options = parser.parse_args(arguments)
    try:
        studies = check(options.root, options.port)
    except PipelineError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    address = f"http://{HOST}:{options.port}"
    for experiment_id, study in studies:
        print(f"{study:<16} {address}{view_path(experiment_id, study)}")
    print(f"{'all runs':<16} {address}\nready in about ten seconds; Ctrl-C stops it", flush=True)
    return serve(server_command(options.root, options.port))


def check(root: Path, port: int) -> list[tuple[str, str]]:
    """Return the newest studies of the store, as (experiment id, name).

    Raises:
        InvalidInput: There is no store, or the port is not to be had.
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
            problems.append(Problem("--root", f"must hold MLflow's database, got {database}, which gives: {error}"))
    if not 1 <= port <= 65535:
        problems.append(Problem("--port", f"must be from 1 to 65535, got {port}"))
    elif why := why_not_free(port):
        problems.append(
            Problem("--port", f"must be free, got {port}: {why}; choose another, such as --port {port + 1}")
        )
    if problems:
        raise InvalidInput("pipeline.ui", problems)
    return studies


def newest_studies(database: Path) -> list[tuple[str, str]]:
    """Return studies as (experiment id, name), newest first, without MLflow, whose import takes seconds."""
    with closing(open_existing(database)) as connection:
        return [(str(experiment_id), study) for experiment_id, study in connection.execute(STUDIES, [MAX_STUDIES])]


def why_not_free(port: int) -> str | None:
    """Return why nothing can listen on a port of this machine, or None."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: a port left a minute ago is free
        try:
            probe.bind((HOST, port))
        except OSError as error:
            return error.strerror
    return None


def server_command(root: Path, port: int) -> list[str]:
    """Return the command that serves the store of `root`: MLflow of this Python, on this machine only."""
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
    # A process group of its own, since Ctrl-C in the terminal would reach each of its processes, and each would print a
    # traceback; they end quietly on SIGTERM.
    server = subprocess.Popen(command, env=ENVIRONMENT | os.environ, process_group=0)
    try:
        return server.wait()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()
        return 0


if __name__ == "__main__":
    sys.exit(main())
