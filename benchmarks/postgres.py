"""Search against `mlflow server` on PostgreSQL, and kill the server in mid-run: is everything there afterwards?

A private PostgreSQL and the server run in a temporary folder. After `--kill-after` seconds of the search the server is
killed, and started again after `--away` seconds. Printed is what the search said, and what MLflow lacks of optuna.db.

    python benchmarks/postgres.py --trials 50 --kill-after 20 --away 30
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from live import compared, recorded

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import postgres_server

STUDY = "server"


def main() -> int:
    """Run the search, the kill and the comparison; return 0 if nothing is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=50, metavar="N", help="trials of the search (default: 50)")
    parser.add_argument("--kill-after", type=float, default=20, metavar="S", help="seconds of search before the kill")
    parser.add_argument("--away", type=float, default=30, metavar="S", help="seconds without a server (default: 30)")
    options = parser.parse_args()
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    with postgres_server.running() as database, tempfile.TemporaryDirectory() as folder:
        port = free_port()
        uri = f"http://127.0.0.1:{port}"
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(contextlib.ExitStack())
            server.enter_context(mlflow_server(database, port, Path(folder) / "artifacts"))
            begun = time.monotonic()
            process = searching(Path(folder) / "root", uri, trials=options.trials)
            reader = threading.Thread(target=show, args=(process, begun))
            reader.start()
            time.sleep(options.kill_after)
            server.close()
            print(f"{time.monotonic() - begun:5.1f} s  the server is killed; the search runs: {process.poll() is None}")
            time.sleep(options.away)
            stack.enter_context(mlflow_server(database, port, Path(folder) / "artifacts"))
            print(f"{time.monotonic() - begun:5.1f} s  the server is back; the search runs: {process.poll() is None}")
            reader.join()
            whole = recorded(uri)
        missing, twice = compared(Path(folder) / "root", whole, study=STUDY)
        lost = options.trials - len(whole)
    print(
        f"status {process.wait()}; afterwards {lost} trials and {missing} points are missing, {twice} are there twice"
    )
    return 1 if lost or missing or twice or process.returncode else 0


def free_port() -> int:
    """Return a port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def mlflow_server(database: str, port: int, artifacts: Path) -> Iterator[None]:
    """Run MLflow's server, with one worker, until the end of the block, which kills it."""
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", database, "--port", str(port)]
    command += ["--artifacts-destination", str(artifacts), "--workers", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        while not answers(port):
            assert process.poll() is None, "the server ended"
            time.sleep(0.2)
        yield
    finally:
        os.killpg(process.pid, 9)
        process.wait()


def answers(port: int) -> bool:
    """Return whether the server answers."""
    with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
        return True
    return False


def searching(root: Path, uri: str, *, trials: int) -> subprocess.Popen[str]:
    """Start a search that MLflow's server is told of."""
    command = [sys.executable, "-m", "pipeline.search", "--trials", str(trials), "--study", STUDY, "--root", str(root)]
    return subprocess.Popen(
        command,
        env={**os.environ, "MLFLOW_TRACKING_URI": uri},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def show(process: subprocess.Popen[str], begun: float) -> None:
    """Print what the search says, and when."""
    assert process.stdout
    for line in process.stdout:
        print(f"{time.monotonic() - begun:5.1f} s  {line[:150].rstrip()}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
