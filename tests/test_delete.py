from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import sys
from pathlib import Path

import pytest
from test_mlflow import DONE, connect, ended, opened, runs, study
from test_store import create, space_with

import pipeline.search
from pipeline.errors import InvalidInput, StorageError, StudyBusy
from pipeline.files.atomic import write_atomic
from pipeline.study.store import Store

# MLflow's own use of SQLAlchemy 2.1.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, mlflow_tables: Path) -> Path:
    """A root with two studies, `mine` and `other`, and MLflow's runs of both."""
    root = tmp_path_factory.mktemp("made")
    shutil.copy(mlflow_tables, root)
    store = Store(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        for name in ("mine", "other"):
            with store.lock(name):
                create(store, space_with(), name=name, trials=8, ended=1)
            write_atomic(store.folder(name) / "best.yaml", "found: nothing")
            tracker = opened(root, study(name, identity=store.header(name).identity))
            tracker.end(ended(0))
            tracker.finish(DONE)
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return shutil.copytree(made, tmp_path / "root")


def files(root: Path) -> list[Path]:
    return sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file() and "artifacts" in path.parts)


def delete(root: Path, name: str, *options: str) -> int:
    return pipeline.search.main(["--root", str(root), "--delete", name, *options])


def names(root: Path) -> list[str]:
    return [header.name for header in Store(root).headers()]


def test_a_deleted_study_is_gone_with_all_that_belongs_to_it_and_no_other(
    made: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(made)
    assert delete(root, "mine", "--yes") == 0
    folder = root / "mlruns" / "studies"
    assert capsys.readouterr().out == (
        f"deleted study mine: 1 trial, {folder / 'mine'}, and the study's record, MLflow in {root}\n"
    )
    assert names(root) == ["other"]
    assert [path.name for path in folder.iterdir()] == ["other"]
    assert [run.data.tags["hpo.study"] for kind in ("study", "trial") for run in runs(root, kind)] == ["other"] * 2
    from mlflow.entities import ViewType

    client = connect(root)
    (experiment,) = [e for e in client.search_experiments() if e.name != "Default"]
    assert len(client.search_runs([experiment.experiment_id], run_view_type=ViewType.ALL)) == 2
    assert [key for key in experiment.tags if key.startswith("mlflow.sharedView")] == ["mlflow.sharedViewState.other"]
    assert len(files(root)) == len(before) // 2
    assert len(list((root / "mlruns" / "artifacts").glob("*/*"))) == 1  # the other study's run; trials have no files
    assert files(made) == before  # of which the root is a copy


def test_a_deletion_that_nobody_can_be_asked_about_is_refused(root: Path) -> None:
    with pytest.raises(InvalidInput, match=r"mine: nobody can be asked, since the input is no terminal; add --yes"):
        delete(root, "mine")
    assert names(root) == ["mine", "other"]


@pytest.mark.parametrize(
    ("answer", "status", "left"), [("\n", 1, ["mine", "other"]), ("\x04", 1, ["mine", "other"]), ("y\n", 0, ["other"])]
)
def test_at_a_terminal_a_deletion_asks_first(
    root: Path, monkeypatch: pytest.MonkeyPatch, answer: str, status: int, left: list[str]
) -> None:
    person, terminal = os.openpty()
    os.write(person, answer.encode())
    with open(terminal) as stdin:  # noqa: PTH123 - a descriptor
        monkeypatch.setattr(sys, "stdin", stdin)
        assert delete(root, "mine") == status
    os.close(person)
    assert names(root) == left


def test_a_study_that_is_not_there_cannot_be_deleted(root: Path) -> None:
    with pytest.raises(
        InvalidInput, match=r"^--delete: 1 problem\n  mime: there is no such study; did you mean mine\?$"
    ):
        delete(root, "mime", "--yes")


def test_a_study_that_is_driven_cannot_be_deleted(root: Path) -> None:
    with Store(root).lock("mine"), pytest.raises(StudyBusy, match=r"study mine is driven by process "):
        delete(root, "mine", "--yes")
    assert names(root) == ["mine", "other"]


def test_a_deletion_that_mlflow_fails_leaves_the_study(root: Path) -> None:
    (root / "mlflow.db").rename(root / "kept.db")
    (root / "mlflow.db").write_text("not a database, but long enough to be read as one" * 20)
    with pytest.raises(
        InvalidInput, match=r"mlflow.db: 1 problem\n  cannot be used as MLflow's database: file is not a d"
    ):
        delete(root, "mine", "--yes")
    (root / "kept.db").rename(root / "mlflow.db")
    with contextlib.closing(sqlite3.connect(root / "mlflow.db")) as database, database:
        database.execute("ALTER TABLE experiments RENAME TO damaged")
    with pytest.raises(StorageError, match=r"^MLflow in .*: .*; study mine is still there$"):
        delete(root, "mine", "--yes")
    assert names(root) == ["mine", "other"]


def test_a_deletion_leaves_what_is_outside_the_root_and_what_others_have_deleted(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client = connect(root)
    mine = [run for kind in ("study", "trial") for run in runs(root, kind) if run.data.tags["hpo.study"] == "mine"]
    ours = {run.data.tags["hpo.kind"]: run.info for run in mine}
    precious = tmp_path / ours["trial"].run_id / "artifacts"
    inside = root / "mlruns" / "studies" / "other"
    for folder in (precious, inside):
        (folder / "kept").mkdir(parents=True)
    deleted = client.create_experiment("deleted by a person", artifact_location=tmp_path.as_uri())
    client.create_run(deleted)
    client.delete_experiment(deleted)
    with contextlib.closing(sqlite3.connect(root / "mlflow.db")) as database, database:
        for kind, folder in (("trial", precious.as_uri()), ("study", str(inside))):
            assert ours[kind].artifact_uri.startswith("file://")
            change = "UPDATE runs SET artifact_uri = ? WHERE run_uuid = ?"
            database.execute(change, [folder, ours[kind].run_id])
    assert delete(root, "mine", "--yes") == 0
    assert (precious / "kept").exists()
    assert (inside / "kept").exists()
    said = capsys.readouterr().err.splitlines()
    assert sorted(said) == sorted(
        f"warning: {folder} is left, since it is no folder of a run below {root / 'mlruns'}"
        for folder in (precious.as_uri(), inside)
    )
    assert [run.data.tags["hpo.study"] for kind in ("study", "trial") for run in runs(root, kind)] == ["other"] * 2
    client.restore_experiment(deleted)
    assert len(client.search_runs([deleted])) == 1
