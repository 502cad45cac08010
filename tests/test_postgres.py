"""What a PostgreSQL server records: MLflow's runs, and the trials of `--storage`, also if it is away for a while."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import postgres_server
import psycopg
import pytest
from test_mlflow import DONE, begun, ended, epoch, opened, study
from test_search import write_space
from test_store import create, ended_trial, space_with
from tiny import RULES

import pipeline.export
import pipeline.report
import pipeline.search
import pipeline.study.postgres
from pipeline.errors import InvalidInput, StorageError, StudyBusy
from pipeline.study.store import Store
from pipeline.study.study import Study

pytestmark = [
    pytest.mark.skipif(postgres_server.binaries() is None, reason="PostgreSQL is not installed"),
    # MLflow's own use of SQLAlchemy 2.1 and, while it is imported, of types.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning"),
]
CANARY = "canary-4711"
"""The server's password, which must stand nowhere."""


@pytest.fixture(scope="module")
def server() -> Iterator[postgres_server.Server]:
    """A server that asks for a password, with two databases: `postgres` for MLflow, and `record`."""
    with postgres_server.server(password=CANARY) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PGPASSWORD", CANARY)
        with psycopg.connect(server.uri, autocommit=True) as connection:
            connection.execute("CREATE DATABASE record")
        yield server


@pytest.fixture
def url(server: postgres_server.Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of `record`, which has no study; lost connections cost no seconds."""
    monkeypatch.setattr(pipeline.study.postgres, "RETRY_S", 0.01)
    monkeypatch.setattr(pipeline.study.postgres, "LOCK_S", 0.05)
    url = server.uri.replace("/postgres?", "/record?")
    yield url
    with psycopg.connect(url) as connection:
        connection.execute("TRUNCATE studies CASCADE")


def test_a_study_is_recorded_whole_in_postgresql(
    server: postgres_server.Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    epochs = epoch(1, accuracy=0.5), epoch(2, accuracy=0.75)
    tracker = opened(tmp_path, study())
    tracker.begin(begun(0))
    tracker.epochs({0: epochs[0]}, at=1_700_000_005.0)
    tracker.flush()
    tracker.end(ended(0, epochs=epochs))
    tracker.finish(DONE)
    assert tracker.close() == []

    from mlflow import MlflowClient

    client = MlflowClient(server.uri)
    found = client.get_experiment_by_name("digits-cnn")
    assert found is not None
    (run,) = client.search_runs([found.experiment_id], "tags.`hpo.kind` = 'trial'")
    assert (run.info.status, run.data.params["base_lr"]) == ("FINISHED", "0.01")
    points = client.get_metric_history(run.info.run_id, "val/accuracy")
    assert sorted((point.step, point.value) for point in points) == [(10, 0.5), (20, 0.75)]
    (parent,) = client.search_runs([found.experiment_id], "tags.`hpo.kind` = 'study'")
    assert parent.info.artifact_uri.startswith((tmp_path / "mlruns" / "artifacts").as_uri())

    with contextlib.closing(Store(tmp_path, server.uri)) as store, pytest.raises(InvalidInput) as refused:
        store.headers()
    assert "has tables of another program, such as MLflow; name another database" in str(refused.value)


def test_studies_in_postgresql_are_found_chosen_opened_and_deleted(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with contextlib.closing(Store(tmp_path, url)) as store:
        for name in ("first", "second"):
            with store.lock(name):
                create(store, space_with(), name=name, trials=4, ended=2)
        assert store.choose(space_with(), trials=4, name=None) == ("second", True)
        with store.lock("second"):
            store.delete("second")
        with pytest.raises(InvalidInput, match="second: there is no such study"):
            store.open("second")
        (header,) = store.headers()
        assert (header.name, header.trials, header.ended) == ("first", 4, 2)
        assert header.document == space_with().document
        study = store.open("first")
        assert [(trial.params, trial.config, trial.metrics, trial.value) for trial in study.ended] == [
            (trial.params, trial.config, trial.metrics, trial.value) for trial in map(ended_trial, range(2))
        ]
    other = tmp_path / "other"
    assert pipeline.search.main(["--root", str(other), "--storage", url, "--delete", "first", "--yes"]) == 0
    said = f"in {url}, and what MLflow in {other} has of it; files below another root stay"
    assert capsys.readouterr().out == f"deleted study first: 2 trials {said}\n"
    with contextlib.closing(Store(tmp_path, url)) as store:
        assert store.headers() == []
        assert store.folder("first").exists()
    assert not (tmp_path / "mlruns" / "optuna.db").exists()


@pytest.fixture
def written(url: str, tmp_path: Path) -> Iterator[tuple[Store, Study, list[str]]]:
    """A study with two trials, while its lock is held; and the warnings."""
    warnings: list[str] = []
    with contextlib.closing(Store(tmp_path, url, warn=warnings.append)) as store, store.lock("mine"):
        study = store.create(space_with(), name="mine", trials=4, rules=RULES)
        for number in range(2):
            study.add(ended_trial(number))
        yield store, study, warnings


def end_sessions(url: str) -> None:
    """End every session of `record` but this one, as a restart of the server does."""
    with psycopg.connect(url) as connection:
        others = "datname = current_database() AND pid != pg_backend_pid()"
        connection.execute(f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE {others}")


BREAKS_INSIDE = """
CREATE SEQUENCE calls;
CREATE FUNCTION break() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN IF nextval(''calls'') = 1 THEN PERFORM pg_terminate_backend(pg_backend_pid()); END IF; RETURN NEW; END';
CREATE TRIGGER break AFTER INSERT ON trials FOR EACH ROW EXECUTE FUNCTION break();
"""


@pytest.mark.parametrize("when", ["before", "inside", "after"])
def test_a_trial_is_stored_once_wherever_the_connection_breaks(
    written: tuple[Store, Study, list[str]], url: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, study, warnings = written
    add, calls = study._stored.add_trial, []

    def break_once(frozen: Any) -> None:
        calls.append(frozen)
        if when == "before" and len(calls) == 1:
            end_sessions(url)
        add(frozen)
        if when == "after":
            end_sessions(url)
            _ = study._stored.user_attrs  # meets the broken connection, as the answer to the commit would

    if when == "inside":
        with psycopg.connect(url) as connection:
            connection.execute(BREAKS_INSIDE)
    monkeypatch.setattr(study._stored, "add_trial", break_once)
    study.add(ended_trial(2))
    study.add(ended_trial(3))
    with psycopg.connect(url) as connection:
        connection.execute("DROP SEQUENCE IF EXISTS calls; DROP FUNCTION IF EXISTS break CASCADE")
        assert connection.execute("SELECT number FROM trials ORDER BY 1").fetchall() == [(0,), (1,), (2,), (3,)]
    assert [trial.number for trial in store.open("mine").ended] == [0, 1, 2, 3]
    assert warnings == []


def test_a_server_that_lost_trials_is_noticed(written: tuple[Store, Study, list[str]], url: str) -> None:
    _, study, _ = written
    with psycopg.connect(url) as connection:
        connection.execute("DELETE FROM trial_user_attributes")
    end_sessions(url)
    with pytest.raises(StorageError, match=r"^the database came back with 0 of the 2 trials that it had stored; resto"):
        study.add(ended_trial(2))
    assert len(study.ended) == 2


def test_a_study_is_driven_from_one_root_at_a_time(
    written: tuple[Store, Study, list[str]], url: str, tmp_path: Path
) -> None:
    with contextlib.closing(Store(tmp_path / "elsewhere", url)) as other:
        words = rf"study mine is driven by process {os.getpid()} on \S+; wait for it, or name another --study"
        with pytest.raises(StudyBusy, match=words), other.lock("mine"):
            pass
        with other.lock("another"):
            assert other.header("mine").ended == 2


def test_a_search_whose_study_was_taken_while_it_was_cut_off_stops(
    written: tuple[Store, Study, list[str]], url: str, tmp_path: Path
) -> None:
    _, study, _ = written
    end_sessions(url)
    with contextlib.closing(Store(tmp_path / "elsewhere", url)) as other, other.lock("mine"):
        with pytest.raises(StudyBusy, match=r"^study mine is driven by process "):
            study.add(ended_trial(2))
        assert other.header("mine").ended == 2
        other.open("mine").add(ended_trial(2))


def test_a_server_that_has_not_noticed_the_broken_connection_gives_the_lock_back(
    written: tuple[Store, Study, list[str]],
) -> None:
    store, study, warnings = written
    connection = store._database._connection  # type: ignore[attr-defined]
    server_side = os.dup(connection.fileno())
    with Path(os.devnull).open() as nothing:
        os.dup2(nothing.fileno(), connection.fileno())  # so that the server sees no end of the connection
    study.add(ended_trial(2))
    os.close(server_side)
    assert [trial.number for trial in store.open("mine").ended] == [0, 1, 2]
    assert len(warnings) == 2  # that it waits, and that it need not


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_database_that_stays_away_ends_the_search(
    written: tuple[Store, Study, list[str]],
    server: postgres_server.Server,
    interrupted: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, study, warnings = written
    if interrupted:
        store.stop_waiting_when(lambda: True)
    else:
        monkeypatch.setattr(pipeline.study.postgres, "PATIENCE_S", 0.0)
    server.kill()
    try:
        with pytest.raises(StorageError) as ended:
            study.add(ended_trial(2))
    finally:
        server.start()
    assert ("interrupted while" if interrupted else "is away for more than 0 minutes") in str(ended.value)
    assert len(warnings) == 1
    study.add(ended_trial(2))
    assert len(store.open("mine").ended) == 3


class Watched(io.StringIO):
    """A stream that calls a function once a text is in it."""

    def __init__(self, text: str, call: Callable[[], object]) -> None:
        super().__init__()
        self._text = text
        self._call: Callable[[], object] | None = call

    def write(self, text: str) -> int:
        written = super().write(text)
        if self._call is not None and self._text in self.getvalue():
            call, self._call = self._call, None
            call()
        return written


def command_lines() -> list[str]:
    """Return the command line of every process of this machine."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            found.append((process / "cmdline").read_text(errors="replace"))
    return found


def test_a_search_waits_for_its_server_and_its_password_is_nowhere(
    server: postgres_server.Server, url: str, tmp_path: Path, mlflow_tables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(mlflow_tables, tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    seen: list[str] = []

    def start() -> None:
        seen.extend(command_lines())
        server.start()

    out, err = Watched("3/8 trials", server.kill), Watched("waiting for the database", start)
    options = ["--root", str(tmp_path), "--storage", url]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        search = ["--space", str(write_space(tmp_path)), "--trials", "8", "--device", "cpu", *options]
        assert pipeline.search.main([*search, "--study", "mine"]) == 0
        monkeypatch.setenv("PIPELINE_STORAGE", url)
        assert pipeline.report.main(["--root", str(tmp_path)]) == 0
        assert pipeline.export.main(["--root", str(tmp_path), "--trial", "0"]) == 0
    place = re.escape(f"{server.folder}:5432")
    reason = "[^\n]+"
    waited = rf"warning: waiting for the database at {place}, for 30 minutes at most: {reason}\n"
    assert re.fullmatch(rf"{waited}warning: the database at {place} is back after \d+ s\n", err.getvalue())
    assert f"record        {url}\n" in out.getvalue()

    assert (tmp_path / "mlruns/studies/mine/record").read_text() == url
    with contextlib.closing(Store(tmp_path, url)) as store:
        study = store.open("mine")
    assert [trial.number for trial in study.ended] == list(range(8))
    assert study.passed_over == 0
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as connection:
        kinds = [value for (value,) in connection.execute("SELECT value FROM tags WHERE key = 'hpo.kind'")]
        record = "\n".join(connection.iterdump())
    assert kinds.count("trial") == 8
    texts = [*seen, out.getvalue(), err.getvalue(), record]
    texts += [path.read_bytes().decode(errors="replace") for path in tmp_path.rglob("*") if path.is_file()]
    assert [text for text in texts if CANARY in text] == []
