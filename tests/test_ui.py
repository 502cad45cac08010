import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import optuna
import pytest

from pipeline import ui
from pipeline.app import mlflow_page

RUN_S = 600
"""Ends a test that hangs."""


def run_ui(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "importtime", "-m", "pipeline.ui", *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=RUN_S)


def messages(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if not line.startswith("import time:")]


def imports_mlflow(done: subprocess.CompletedProcess[str]) -> bool:
    return any(line.endswith("| mlflow") for line in done.stderr.splitlines())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A store with the part of MLflow's tables that is read without MLflow; test_mlflow has the real ones."""
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database, database:
        database.execute("CREATE TABLE runs (run_uuid, experiment_id, lifecycle_stage, start_time)")
        database.execute("CREATE TABLE tags (run_uuid, key, value)")
        for number, (study, stage) in enumerate([("first", "active"), ("gone", "deleted"), ("my last", "active")]):
            database.execute("INSERT INTO runs VALUES (?, 4, ?, ?)", [f"r{number}", stage, number])
            database.execute("INSERT INTO tags VALUES (?, 'hpo.kind', 'study')", [f"r{number}"])
            database.execute("INSERT INTO tags VALUES (?, 'hpo.study', ?)", [f"r{number}", study])
    return tmp_path


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind((mlflow_page.HOST, 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((mlflow_page.HOST, 0))
        return int(probe.getsockname()[1])


def test_help_needs_no_mlflow() -> None:
    done = run_ui("--help")
    assert done.returncode == 0
    assert "--root" in done.stdout
    assert not imports_mlflow(done)


def test_bad_input_is_told_at_once_without_mlflow(tmp_path: Path) -> None:
    done = run_ui("--root", str(tmp_path), "--port", "70000")
    assert done.returncode == 2
    assert not imports_mlflow(done)
    assert "--port: must be a whole number from 1 to 65535, got '70000'" in messages(done)[-1]


def test_a_folder_without_a_store_is_told_at_once_without_mlflow(tmp_path: Path, free_port: int) -> None:
    done = run_ui("--root", str(tmp_path), "--port", str(free_port))
    assert done.returncode == 2
    assert not imports_mlflow(done)
    assert messages(done) == [
        "pipeline.ui: 1 problem",
        f"  --root: must hold an mlflow.db, got {tmp_path}; search first, `python -m pipeline.search`, "
        "or name the folder of a search that ran",
    ]


def test_a_busy_port_is_refused_with_a_remedy(root: Path, busy_port: int) -> None:
    done = run_ui("--root", str(root), "--port", str(busy_port))
    assert done.returncode == 2
    assert messages(done) == [
        "pipeline.ui: 1 problem",
        f"  --port: must be free, got {busy_port}: Address already in use; choose another, "
        f"such as --port {busy_port + 1}",
    ]


def test_a_file_that_is_no_database_is_refused(tmp_path: Path, free_port: int) -> None:
    (tmp_path / "mlflow.db").write_text("no database " * 1000)
    done = run_ui("--root", str(tmp_path), "--port", str(free_port))
    assert done.returncode == 2
    assert messages(done)[1].endswith("file is not a database; move it away, or name another --root")


def test_a_store_elsewhere_is_named_where_the_root_has_none(
    tmp_path: Path, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@tracking:5000")
    done = run_ui("--root", str(tmp_path), "--port", str(free_port))
    assert messages(done)[1].endswith("with MLFLOW_TRACKING_URI set, runs are at http://***@tracking:5000")


def test_studies_come_newest_first_without_deleted_ones(root: Path) -> None:
    assert mlflow_page.newest_studies(f"sqlite:///{root / 'mlflow.db'}") == [("4", "my last"), ("4", "first")]


def test_a_database_that_the_environment_names_is_served_and_its_uri_is_on_no_command_line(
    root: Path,
    tmp_path: Path,
    free_port: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    uri = f"sqlite:///{root / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    served: list[tuple[list[str], dict[str, str]]] = []

    def serve(command: list[str], variables: dict[str, str]) -> int:
        served.append((command, variables))
        return 0

    monkeypatch.setattr(mlflow_page, "serve", serve)
    assert ui.main(["--root", str(tmp_path / "elsewhere"), "--port", str(free_port)]) == 0
    assert capsys.readouterr().out.startswith("my last ")
    ((command, variables),) = served
    assert variables == {"MLFLOW_BACKEND_STORE_URI": uri}
    assert uri not in " ".join(command)


def test_names_from_a_database_are_escaped(
    root: Path, free_port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with closing(sqlite3.connect(root / "mlflow.db")) as database, database:
        database.execute("UPDATE tags SET value = ? WHERE value = 'first'", ["\x1b]0;x\x07"])
    monkeypatch.setattr(mlflow_page, "serve", lambda command, variables: 0)
    ui.main(["--root", str(root), "--port", str(free_port)])
    assert "\\x1b]0;x\\x07" in capsys.readouterr().out.splitlines()[1]


def test_the_server_gets_this_store_this_machine_and_one_worker(tmp_path: Path) -> None:
    command = mlflow_page.server_command(tmp_path, 5001)
    assert command[:4] == [sys.executable, "-m", "mlflow", "ui"]
    options = dict(zip(command[4::2], command[5::2], strict=True))
    folder = Path(optuna.__file__).parent.parent  # where packages are
    assert options == {
        "--artifacts-destination": f"{tmp_path}/mlruns/artifacts",
        "--host": "127.0.0.1",
        "--port": "5001",
        "--workers": "1",
        "--uvicorn-opts": f"--log-level warning --app-dir {folder}",
    }


def test_ctrl_c_ends_the_server_and_leaves_quietly() -> None:
    # `serve` as the command line runs it, with a server that says when it listens.
    server = "print('listening', flush=True); import signal; signal.pause()"
    code = "import sys; from pipeline.app.mlflow_page import serve; "
    code += f"sys.exit(serve([sys.executable, '-c', {server!r}], {{}}))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"listening\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=RUN_S)  # ends only when the server, too, has let go of the pipe
    assert (process.returncode, errors) == (0, b"")


def test_the_link_of_the_newest_study_is_printed_first(
    root: Path, free_port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mlflow_page, "serve", lambda command, variables: 0)
    assert ui.main(["--root", str(root), "--port", str(free_port)]) == 0
    link = (
        f"http://127.0.0.1:{free_port}/#/experiments/4/runs?workflowType=machine_learning&viewStateShareKey=my%20last"
    )
    assert link in capsys.readouterr().out.splitlines()[0]
