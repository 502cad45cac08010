from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import io
import json
import math
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna_dashboard._app import create_app  # type: ignore[import-untyped]
from tiny import RULES

from pipeline.errors import InvalidInput, StorageError, StudyBusy
from pipeline.files.locks import folder_locked
from pipeline.files.sqlite import create_whole
from pipeline.space.config import TrialConfig
from pipeline.space.load import space_from_document
from pipeline.space.search_space import Objective, SearchSpace
from pipeline.space.trial import EndedTrial, EpochMetrics, TrialState
from pipeline.study.samplers import distributions
from pipeline.study.store import Store
from pipeline.study.stored_trial import to_optuna

DOCUMENT: dict[str, Any] = {
    "workload": {"name": "digits", "model": "mlp"},
    "epochs": 2,
    "batch_size": 64,
    "optimizer": {"sgd": {"base_lr": {"low": 1e-3, "high": 1.0, "log": True}}},
    "scheduler": {"constant": {}},
    "param_groups": {"all": {"pattern": "*"}},
    "sampler": {"group_size": 3},
}
STUDY_FILES = [
    f"mlruns/studies/mine/{name}" for name in ("lock", "best.yaml", "checkpoints/trials-to-000001-epoch-000001.pt")
]


def space_with(**changes: Any) -> SearchSpace:
    return space_from_document({**DOCUMENT, **changes}, name="small")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def ended_trial(number: int) -> EndedTrial:
    rate = 0.01 * (number + 1)
    config = TrialConfig.from_dict(
        {**DOCUMENT, "seed": 0, "precision": "fp32", "deterministic": False, "optimizer": {"sgd": {"base_lr": rate}}}
    )
    metrics = {"train/loss": 0.5, "val/loss": 0.5, "val/accuracy": 0.75}
    return EndedTrial(
        number=number,
        config=config,
        params={"sgd.base_lr": rate},
        state=TrialState.COMPLETE,
        objective=Objective(),
        reason=None,
        value=0.75,
        epochs=(EpochMetrics(epoch=1, step=20, metrics=metrics, lr={}),),
        started=1_700_000_000.0,
        ended=1_700_000_001.0,
        environment={},
    )


def create(store: Store, space: SearchSpace, *, name: str, trials: int, ended: int = 0) -> None:
    study = store.create(space, name=name, trials=trials, rules=RULES)
    for number in range(ended):
        study.add(ended_trial(number))
    if ended == trials:
        study.finish(confirmed=True)


PARTS = {
    "trial_params": "param_name, param_value, distribution_json",
    "trial_values": "objective, value, value_type",
    "trial_intermediate_values": "step, intermediate_value, intermediate_value_type",
    "trial_user_attributes": "key, value_json",
    "trial_system_attributes": "key, value_json",
}
"""Optuna's tables of the parts of a trial, to their columns but the ids."""


def rows(database: Path, study: str) -> list[list[tuple[Any, ...]]]:
    where = "JOIN studies USING (study_id) WHERE study_name = ? ORDER BY number"
    trials = f"SELECT number, state, datetime_start, datetime_complete FROM trials {where}"
    parts = [
        f"SELECT number, {of} FROM {name} JOIN trials USING (trial_id) {where}, {of}" for name, of in PARTS.items()
    ]
    with contextlib.closing(sqlite3.connect(database)) as connection:
        return [list(connection.execute(query, [study])) for query in (trials, *parts)]


def test_trials_that_are_stored_together_are_stored_as_optuna_stores_each(store: Store) -> None:
    study = store.create(space_with(), name="mine", trials=9, rules=RULES)
    metrics = {"train/loss": math.inf, "val/loss": math.nan, "val/accuracy": -math.inf}
    epochs = (EpochMetrics(epoch=1, step=20, metrics=metrics, lr={}),)
    trials = [
        ended_trial(0),
        dataclasses.replace(ended_trial(1), state=TrialState.PRUNED, value=None, epochs=epochs, reason="median"),
        dataclasses.replace(ended_trial(2), value=math.inf, params={}),
        dataclasses.replace(ended_trial(3), state=TrialState.FAILED, value=None, epochs=()),
    ]
    study.add(*trials[:1])
    study.add(*trials[1:])
    storage = optuna.storages.RDBStorage(f"sqlite:///{store.database}")
    reference = optuna.create_study(storage=storage, study_name="reference", direction="maximize")
    for trial in trials:
        reference.add_trial(to_optuna(trial, study.space.objective, distributions(study.space)))
    assert rows(store.database, "mine") == rows(store.database, "reference")


def test_trials_that_are_stored_together_are_all_stored_or_none(store: Store) -> None:
    study = store.create(space_with(), name="mine", trials=9, rules=RULES)
    study.add(ended_trial(0))
    with contextlib.closing(sqlite3.connect(store.database)) as connection:
        connection.execute(
            "CREATE TRIGGER full BEFORE INSERT ON trial_user_attributes WHEN NEW.value_json = '0.03'"
            " BEGIN SELECT RAISE(ABORT, 'the disk is full'); END"
        )
    with pytest.raises(StorageError, match=r"^storing trials 1 to 2: .*the disk is full"):
        study.add(ended_trial(1), ended_trial(2))
    assert len(study.ended) == 1
    assert [header.ended for header in store.headers()] == [1]


def test_a_root_without_studies_is_only_looked_at(store: Store) -> None:
    assert store.headers() == []
    assert store.choose(space_with(), trials=8, name=None) == ("small-1", False)
    assert list(store.root.iterdir()) == []


def test_headers_tell_what_a_study_is_without_its_trials(store: Store) -> None:
    space = space_with()
    create(store, space, name="first", trials=50, ended=2)
    create(store, space, name="second", trials=8)
    first, second = store.headers()
    assert (first.name, first.space, first.trials, first.group_size, first.ended) == ("first", "small", 50, 3, 2)
    assert (second.name, second.ended) == ("second", 0)
    assert first.document == space.document


def test_an_opened_study_has_the_space_that_it_was_made_with(store: Store) -> None:
    space = space_with()
    create(store, space, name="first", trials=50)
    study = store.open("first")
    assert study.space == space
    assert study.group_size == 3


def test_the_newest_study_opens_by_default(store: Store) -> None:
    create(store, space_with(), name="z-older", trials=8)
    create(store, space_with(), name="a-newer", trials=8)
    assert store.open(None).name == "a-newer"


def test_opening_with_another_number_of_trials_notes_it(store: Store) -> None:
    create(store, space_with(), name="first", trials=12)
    assert store.open("first", trials=100).group_size == 3
    (header,) = store.headers()
    assert (header.trials, header.group_size) == (100, 3)


def test_choose_goes_on_with_the_newest_unfinished_study_of_the_same_search(store: Store) -> None:
    space = space_with()
    create(store, space, name="unfinished", trials=2, ended=1)
    create(store, space, name="newer", trials=2, ended=1)
    create(store, space, name="finished", trials=2, ended=2)
    create(store, space_with(seed=1), name="other-seed", trials=2)
    create(store, space_with(epochs=3), name="other-space", trials=2)
    assert store.choose(space, trials=2, name=None) == ("newer", True)
    assert store.choose(space_with(seed=1), trials=2, name=None) == ("other-seed", True)
    assert store.choose(space, trials=3, name=None) == ("small-1", False)
    assert store.choose(space_with(seed=2), trials=2, name=None) == ("small-1", False)


def test_a_study_that_is_older_than_a_setting_goes_on_with_its_default(store: Store) -> None:
    create(store, space_with(), name="older", trials=2, ended=1)
    study = optuna.load_study(study_name="older", storage=f"sqlite:///{store.database}")
    header = study.user_attrs["pipeline"]
    del header["document"]["objective"]["of"]
    study.set_user_attr("pipeline", header)
    assert store.choose(space_with(), trials=2, name=None) == ("older", True)
    assert store.choose(space_with(), trials=2, name="older") == ("older", True)
    best = {"metric": "val/accuracy", "of": "best"}
    with pytest.raises(InvalidInput, match=r'objective\.of: the study has "last", this search "best"'):
        store.choose(space_with(objective=best), trials=2, name="older")


def test_a_study_whose_code_or_data_have_changed_goes_on_only_if_that_is_meant(store: Store) -> None:
    before = {"code of task.py": "abc", "train": "200 samples of (1, 1), abc"}
    now = {"code of task.py": "def", "train": "201 samples of (1, 1), def"}
    store.create(space_with(), name="mine", trials=2, rules=RULES, fingerprint=before)
    assert store.choose(space_with(), trials=2, name=None, fingerprint=before) == ("mine", True)
    assert store.choose(space_with(), trials=2, name=None, fingerprint=now) == ("small-1", False)
    with pytest.raises(InvalidInput) as refused:
        store.choose(space_with(), trials=2, name="mine", fingerprint=now)
    assert str(refused.value).splitlines()[:3] == [
        "--study mine: 2 problems",
        "  code of task.py: has changed",
        "  train: was 200 samples of (1, 1) and is 201 samples of (1, 1)",
    ]
    assert (
        "seed data that is drawn at random, choose another --study, or, if what changed does not matter, add "
        in str(refused.value)
    )
    assert "--changed-code" in str(refused.value)
    assert store.choose(space_with(), trials=2, name="mine") == ("mine", True)
    store.open("mine", fingerprint=now)
    assert store.choose(space_with(), trials=2, name="mine", fingerprint=now) == ("mine", True)


def test_a_new_studys_name_is_the_first_number_that_is_free(store: Store) -> None:
    for name in ("small-1", "small-3"):
        create(store, space_with(), name=name, trials=1, ended=1)
    assert store.choose(space_with(), trials=1, name=None) == ("small-2", False)


def test_a_named_study_goes_on_whatever_its_number_of_trials(store: Store) -> None:
    create(store, space_with(), name="mine", trials=1, ended=1)
    assert store.choose(space_with(), trials=5, name="mine") == ("mine", True)
    assert store.choose(space_with(), trials=5, name="new") == ("new", False)


def test_a_named_study_of_another_space_is_refused_with_every_difference(store: Store) -> None:
    create(store, space_with(), name="mine", trials=8)
    changed = space_with(
        epochs=3,
        optimizer={"sgd": {"base_lr": {"low": 1e-4, "high": 1.0, "log": True}}, "rprop": {"base_lr": 0.1}},
    )
    with pytest.raises(InvalidInput) as refused:
        store.choose(changed, trials=8, name="mine")
    message = str(refused.value)
    assert message.startswith("--study mine: ")
    assert "\n  epochs: the study has 2, this search 3\n" in message
    assert "\n  optimizer.sgd.base_lr.low: the study has 0.001, this search 0.0001\n" in message
    assert "\n  optimizer.rprop.base_lr: the study has nothing, this search 0.1\n" in message
    assert message.endswith("a study keeps its space; choose another --study, or the space that it was made with")
    assert "sgd.base_lr.high" not in message


def test_the_remedy_of_a_refused_study_is_no_problem_of_its_own_and_long_lists_are_cut(store: Store) -> None:
    create(store, space_with(), name="mine", trials=8)
    with pytest.raises(InvalidInput) as refused:
        store.choose(space_with(seed=7), trials=8, name="mine")
    seed = space_with().seed
    assert str(refused.value).splitlines() == [
        "--study mine: 1 problem",
        f"  seed: the study has {seed}, this search 7",
        f"  a study keeps its seed; choose another --study, or --seed {seed}",
    ]
    groups = {f"g{number}": {"pattern": f"layer{number}.*"} for number in range(9)}
    with pytest.raises(InvalidInput) as refused:
        store.choose(space_with(param_groups={**groups, "rest": {"pattern": "*"}}), trials=8, name="mine")
    first, *shown, more, remedy = str(refused.value).splitlines()
    count = len(refused.value.problems)
    assert first == f"--study mine: {count} problems"
    assert (len(shown), more) == (8, f"  … ({count - 8} more)")
    assert remedy.startswith("  a study keeps its space; ")


def test_opening_a_study_that_is_not_there_names_the_nearest(store: Store) -> None:
    with pytest.raises(InvalidInput, match=r"holds no study; run `python -m pipeline\.search`, or name another --root"):
        store.open(None)
    create(store, space_with(), name="default-1", trials=8)
    with pytest.raises(InvalidInput, match=r"defualt-1: there is no such study; did you mean default-1\?"):
        store.open("defualt-1")


def test_studies_of_other_programs_are_left_alone(store: Store) -> None:
    create(store, space_with(), name="mine", trials=8)
    optuna.create_study(study_name="theirs", storage=f"sqlite:///{store.database}")
    assert [header.name for header in store.headers()] == ["mine"]


def test_a_study_whose_name_leads_out_of_the_root_is_another_programs(store: Store) -> None:
    create(store, space_with(), name="mine", trials=8, ended=1)
    study = optuna.load_study(study_name="mine", storage=f"sqlite:///{store.database}")
    for name in ("../../../evil", "/tmp/evil", ".."):
        theirs = optuna.create_study(study_name=name, storage=f"sqlite:///{store.database}", direction="maximize")
        theirs.set_user_attr("pipeline", study.user_attrs["pipeline"])
        optuna.create_study(study_name=f"{name}/bare", storage=f"sqlite:///{store.database}")
    assert [header.name for header in store.headers()] == ["mine"]
    assert store.choose(space_with(), trials=8, name=None) == ("mine", True)
    with pytest.raises(InvalidInput, match=r"evil: there is no such study"):
        store.open("../../../evil")


def test_no_link_below_the_root_is_followed(tmp_path: Path) -> None:
    root, theirs = tmp_path / "root", tmp_path / "theirs"
    with Store(root).lock("mine"):
        create(Store(root), space_with(), name="mine", trials=8, ended=1)
    for name in STUDY_FILES:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(f"the content of {name}")
    for link in ("mlruns", "mlruns/optuna.db", "mlruns/studies", "mlruns/studies/mine", *STUDY_FILES):
        (root / link).rename(theirs)
        (root / link).symlink_to(theirs)
        before = contents(theirs)
        store = Store(root)
        words = (
            rf"{link}: is a link to {theirs}; links below a root are not followed; put what it leads to in its place"
        )
        with pytest.raises(InvalidInput, match=words), store.lock("mine"):
            create(store, space_with(), name="other", trials=8)
        assert contents(theirs) == before
        (root / link).unlink()
        theirs.rename(root / link)


def contents(path: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in (path, *path.rglob("*")) if file.is_file()}


def test_a_study_of_another_format_is_refused(store: Store) -> None:
    create(store, space_with(), name="mine", trials=8)
    study = optuna.load_study(study_name="mine", storage=f"sqlite:///{store.database}")
    study.set_user_attr("pipeline", study.user_attrs["pipeline"] | {"format": 99})
    with pytest.raises(
        InvalidInput, match=r"mine: is of format 99, and this version reads format 3; use another --root"
    ):
        store.headers()


def test_a_database_that_is_none_is_refused(store: Store) -> None:
    store.database.parent.mkdir()
    store.database.write_text("not a database, but long enough to be read as one" * 20)
    with pytest.raises(InvalidInput, match=r"cannot be used as Optuna's database: .*; move it away, or name another"):
        store.headers()


def test_a_database_survives_the_end_of_its_process_without_closing(store: Store) -> None:
    create(store, space_with(), name="mine", trials=8, ended=1)
    script = (
        "import os, sys; sys.path[:0] = ['tests']\n"
        "from pathlib import Path; from test_store import Store, ended_trial\n"
        f"Store(Path({str(store.root)!r})).open('mine').add(ended_trial(1))\n"
        "os.kill(os.getpid(), 9)"
    )
    ended = subprocess.run([sys.executable, "-c", script], check=False, cwd=Path(__file__).parent.parent)
    assert ended.returncode == -9
    assert [trial.number for trial in store.open("mine").ended] == [0, 1]


@pytest.fixture
def holder(store: Store) -> Iterator[subprocess.Popen[str]]:
    """A process that drives the study `mine` until it is killed."""
    script = (
        "from pathlib import Path; from pipeline.study.store import Store\n"
        f"with Store(Path({str(store.root)!r})).lock('mine'):\n"
        "    print('held', flush=True)\n"
        "    input()"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_and_told_who_drives_the_study(store: Store, holder: subprocess.Popen[str]) -> None:
    by = f"process {holder.pid} on {socket.gethostname()}"
    with pytest.raises(StudyBusy) as refused, store.lock("mine"):
        pass
    assert str(refused.value) == f"study mine is driven by {by}; wait for it, or name another --study"
    with store.lock("other"):
        pass


def test_the_lock_of_a_killed_process_does_not_block(store: Store, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    with store.lock("mine"):
        pass
    with store.lock("mine"), pytest.raises(StudyBusy) as refused, store.lock("mine"):
        pass
    assert f"driven by process {os.getpid()} on {socket.gethostname()};" in str(refused.value)


def test_a_study_is_created_whole_or_not_at_all(store: Store) -> None:
    create(store, space_with(), name="other", trials=9)
    with contextlib.closing(sqlite3.connect(store.database)) as connection:
        connection.execute(
            "CREATE TRIGGER full BEFORE INSERT ON study_user_attributes"
            " BEGIN SELECT RAISE(ABORT, 'the disk is full'); END"
        )
    with pytest.raises(StorageError, match=r"^creating study small-1: .*the disk is full"):
        create(store, space_with(), name="small-1", trials=8)
    with contextlib.closing(sqlite3.connect(store.database)) as connection:
        connection.execute("DROP TRIGGER full")
    assert store.choose(space_with(), trials=8, name="small-1") == ("small-1", False)
    create(store, space_with(), name="small-1", trials=8)
    assert [header.name for header in store.headers()] == ["other", "small-1"]


def test_a_new_study_is_to_optuna_one_with_a_direction_and_a_named_metric(store: Store) -> None:
    create(store, space_with(), name="mine", trials=8)
    study = optuna.load_study(study_name="mine", storage=f"sqlite:///{store.database}")
    assert (study.direction.name, study.metric_names) == ("MAXIMIZE", ["val/accuracy"])


def test_a_database_is_made_whole_whatever_a_killed_process_left(tmp_path: Path) -> None:
    database = tmp_path / "mlruns" / "optuna.db"
    with pytest.raises(InterruptedError):
        create_whole(database, half_built)
    assert not database.exists()
    database.with_name("optuna.db-wal").write_text("of a database that was removed")
    database.with_name("optuna.db-backup").write_text("of a person's")
    create_whole(database, lambda path: path.write_text("whole"))
    create_whole(database, half_built)  # not called: it is there
    left = {path.name: path.read_text() for path in database.parent.iterdir()}
    assert left == {"optuna.db": "whole", "optuna.db-backup": "of a person's"}


def half_built(path: Path) -> None:
    path.write_text("half")
    path.with_name(f"{path.name}-wal").write_text("half")
    raise InterruptedError


def test_a_folder_is_held_by_one_after_the_other(tmp_path: Path) -> None:
    order = []
    begun = threading.Event()

    def second() -> None:
        begun.set()
        with folder_locked(tmp_path / "study"):
            order.append("second")

    with folder_locked(tmp_path / "study"):
        thread = threading.Thread(target=second)
        thread.start()
        begun.wait()
        with pytest.raises(RuntimeError), folder_locked(tmp_path / "another"):
            raise RuntimeError
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_optunas_own_library_reads_a_study(store: Store) -> None:
    create(store, space_with(), name="mine", trials=8, ended=3)
    study = optuna.load_study(study_name="mine", storage=f"sqlite:///{store.database}")
    assert study.direction is optuna.study.StudyDirection.MAXIMIZE
    assert study.best_trial.number == 0
    assert [trial.params for trial in study.trials] == [ended_trial(number).params for number in range(3)]


def test_optunas_command_line_reads_a_study(store: Store) -> None:
    create(store, space_with(), name="mine", trials=8, ended=2)
    storage = f"sqlite:///{store.database}"
    command = [sys.executable, "-c", "from optuna.cli import main; main()", "trials", "--study-name", "mine"]
    shown = subprocess.run(
        [*command, "--storage", storage, "--format", "json"], check=True, capture_output=True, text=True
    )
    trials = json.loads(shown.stdout)
    assert [(trial["number"], trial["state"], trial["value"]) for trial in trials] == [
        (0, "COMPLETE", {"val/accuracy": 0.75}),
        (1, "COMPLETE", {"val/accuracy": 0.75}),
    ]


def test_optuna_dashboard_serves_a_study(store: Store) -> None:
    create(store, space_with(), name="mine", trials=8, ended=2)
    app = create_app(optuna.storages.RDBStorage(f"sqlite:///{store.database}"))

    def get(path: str) -> Any:
        status: list[str] = []
        environ = {"REQUEST_METHOD": "GET", "PATH_INFO": path, "wsgi.input": io.BytesIO(), "wsgi.errors": io.StringIO()}
        body = b"".join(app(environ, lambda line, headers, error=None: status.append(line)))
        assert status == ["200 OK"]
        return json.loads(body)

    (summary,) = get("/api/studies")["study_summaries"]
    assert summary["study_name"] == "mine"
    trials = get(f"/api/studies/{summary['study_id']}")["trials"]
    assert [trial["values"] for trial in trials] == [[0.75], [0.75]]


def theirs(store: Store) -> optuna.Study:
    """Return the study `mine` as another program opens it."""
    return optuna.load_study(study_name="mine", storage=f"sqlite:///{store.database}")


def test_trials_that_other_programs_add_are_passed_over_with_a_word(tmp_path: Path) -> None:
    warnings: list[str] = []
    store = Store(tmp_path, warn=warnings.append)
    create(store, space_with(), name="mine", trials=3, ended=1)
    rate = {"sgd.base_lr": 0.5}
    theirs(store).enqueue_trial(rate)
    study = store.open("mine")
    assert study.rules == RULES
    study.add(ended_trial(1))
    theirs(store).ask()
    theirs(store).add_trials([theirs(store).trials[0]])  # a copy of one of ours
    rates = optuna.distributions.FloatDistribution(1e-3, 1.0, log=True)
    best = optuna.trial.create_trial(value=1.0, params=rate, distributions={"sgd.base_lr": rates})
    theirs(store).add_trial(best)
    study = store.open("mine")
    assert [trial.number for trial in study.ended] == [0, 1]
    assert [trial.params for trial in study.ended] == [ended_trial(0).params, ended_trial(1).params]
    assert study.best()[0].number == 0
    assert list(study.next_group(3)) == [2]
    assert store.choose(space_with(), trials=3, name=None) == ("mine", True)
    study.add(ended_trial(2))
    assert [trial.number for trial in store.open("mine").ended] == [0, 1, 2]
    assert warnings[-1] == "3 trials of study mine, added by another program, passed over: no search trained it"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"config": {}},
            "trial 1 of study mine is not as a search stored it: KeyError 'optimizer'; restore it from a ",
        ),
        ({"history": None}, "trial 1 of study mine is not as a search stored it: "),
        ({"state": "won"}, "trial 1 of study mine is not as a search stored it: ValueError 'won' is not a valid Trial"),
    ],
)
def test_a_trial_that_another_program_changed_is_told(store: Store, change: dict[str, Any], words: str) -> None:
    create(store, space_with(), name="mine", trials=3, ended=1)
    changed = optuna.trial.create_trial(
        value=0.5, user_attrs=theirs(store).trials[0].user_attrs | {"number": 1} | change
    )
    theirs(store).add_trial(changed)
    with pytest.raises(StorageError) as told:
        store.open("mine")
    assert str(told.value).startswith(words)
    assert str(told.value).endswith("or delete the study: python -m pipeline.search --delete mine")


def test_a_header_that_another_program_changed_is_told(store: Store) -> None:
    create(store, space_with(), name="mine", trials=3)
    header = theirs(store).user_attrs["pipeline"]
    changes: dict[str, dict[str, Any]] = {
        "mine: another program changed its trials, got 'many'; restore it, or remove the study": {"trials": "many"},
        "mine: another program changed its document, got None; restore it": {"document": None},
        "mine: is of format None, and this version reads format 3": {"format": None},
    }
    for words, change in changes.items():
        theirs(store).set_user_attr("pipeline", header | change)
        with pytest.raises(InvalidInput) as refused:
            store.headers()
        assert words in str(refused.value)


@pytest.mark.parametrize("numbered", [True, False])
def test_a_trial_that_another_program_removed_is_missed(store: Store, numbered: bool) -> None:
    create(store, space_with(), name="mine", trials=3, ended=3)
    with contextlib.closing(sqlite3.connect(store.database)) as database, database:
        database.execute("DELETE FROM trials WHERE number = 1")
        if not numbered:  # as an earlier version stored them
            database.execute("DELETE FROM trial_user_attributes WHERE key = 'number'")
    if numbered:
        with pytest.raises(StorageError, match=r"^trial 1 of study mine was removed .*; restore .* --delete mine$"):
            store.open("mine")
    else:
        assert [trial.params for trial in store.open("mine").ended] == [ended_trial(n).params for n in (0, 2)]


def test_a_study_that_another_program_renamed_goes_on_under_its_new_name(store: Store) -> None:
    store.create(space_with(), name="small-1", trials=2, rules=RULES).add(ended_trial(0))
    store.close()
    with contextlib.closing(sqlite3.connect(store.root / "mlruns" / "optuna.db")) as connection, connection:
        connection.execute("UPDATE studies SET study_name = 'renamed'")
    again = Store(store.root)
    assert [header.name for header in again.headers()] == ["renamed"]
    study = again.open("renamed", trials=2)
    assert (study.name, len(study.ended)) == ("renamed", 1)


@pytest.mark.parametrize(
    ("version", "remedy"),
    [
        ("v2.6.0.a", "copy the file, then run `optuna storage upgrade --storage sqlite:///DATABASE`, or name another"),
        ("v99.0.0.a", "does not know them; install the Optuna that made them, or name another --root"),
    ],
)
def test_tables_of_another_optuna_are_refused_with_the_command_that_upgrades_them(
    store: Store, version: str, remedy: str
) -> None:
    create(store, space_with(), name="mine", trials=3)
    store.close()
    with contextlib.closing(sqlite3.connect(store.database)) as database, database:
        database.execute("UPDATE alembic_version SET version_num = ?", [version])
    with pytest.raises(InvalidInput) as refused:
        Store(store.root).headers()
    assert str(refused.value).startswith(f"{store.database}: 1 problem\n  has tables of another version of Optuna: ")
    assert remedy.replace("DATABASE", str(store.database)) in str(refused.value)


def test_a_database_of_another_program_is_refused_and_gets_no_tables(store: Store) -> None:
    store.database.parent.mkdir()
    with contextlib.closing(sqlite3.connect(store.database)) as database, database:
        database.execute("CREATE TABLE theirs (x)")
    before = store.database.read_bytes()
    with pytest.raises(
        InvalidInput, match=r"cannot be used as Optuna's database: opening: no such table: version_info"
    ):
        store.headers()
    assert store.database.read_bytes() == before


def test_a_file_system_without_locks_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    words = r": cannot be locked: No locks available; a search needs a file system with locks; name another --root$"
    with pytest.raises(StorageError, match=f"^{store.root}/mlruns/studies/mine/lock{words}"), store.lock("mine"):
        pass
    with pytest.raises(StorageError, match=f"^{store.root}/new{words}"), folder_locked(store.root / "new"):
        pass


@pytest.mark.parametrize("replaced", [False, True])
def test_a_database_that_is_removed_or_replaced_in_mid_run_is_noticed_at_the_next_trial(
    store: Store, tmp_path: Path, replaced: bool
) -> None:
    create(store, space_with(), name="mine", trials=3, ended=1)
    study = store.open("mine")
    if replaced:
        shutil.copy(store.database, tmp_path / "copy.db")
        (tmp_path / "copy.db").replace(store.database)
    else:
        store.database.unlink()
    words = (
        r"optuna\.db was removed or replaced by another program meanwhile; put it back; without it, the same command"
    )
    with pytest.raises(StorageError, match=words):
        study.add(ended_trial(1))
    with pytest.raises(StorageError, match=words):
        study.next_group(3)
    assert len(study.ended) == 1


def test_a_study_that_is_removed_in_mid_run_is_noticed_at_the_next_trial(store: Store) -> None:
    create(store, space_with(), name="mine", trials=3, ended=1)
    study = store.open("mine")
    optuna.delete_study(study_name="mine", storage=f"sqlite:///{store.database}")
    for write in (lambda: study.add(ended_trial(1)), lambda: study.next_group(3)):
        with pytest.raises(StorageError, match=r": study mine was removed by another program meanwhile; the same com"):
            write()


def test_a_database_that_is_locked_after_the_wait_is_waited_for_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    create(store, space_with(), name="mine", trials=3)
    tries: list[int] = []

    def write() -> None:
        tries.append(len(tries))
        if len(tries) < 3:
            raise sqlite3.OperationalError("database is locked")

    store._database.write("writing", write)
    assert tries == [0, 1, 2]


def test_trials_go_to_the_study_that_was_opened_whatever_its_name_is_by_now(tmp_path: Path) -> None:
    store = Store(tmp_path)
    create(store, space_with(), name="mine", trials=3)
    study = store.open("mine")
    with contextlib.closing(sqlite3.connect(store.database)) as connection, connection:
        connection.execute("UPDATE studies SET study_name = 'renamed'")
    optuna.create_study(study_name="mine", storage=f"sqlite:///{store.database}")
    study.add(ended_trial(0))
    assert theirs(store).trials == []


def test_a_search_waits_for_a_database_that_another_program_has_locked_and_says_so(tmp_path: Path) -> None:
    warnings: list[str] = []

    def unlock(warning: str) -> None:
        warnings.append(warning)
        other.rollback()

    store = Store(tmp_path, warn=unlock)
    create(store, space_with(), name="mine", trials=3)
    study = store.open("mine")
    with contextlib.closing(sqlite3.connect(store.database, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        study.add(ended_trial(0))
    assert warnings == [f"{store.database} is locked by another program; the search waits until it is unlocked"]
    assert len(store.open("mine").ended) == 1


EXPORTS = """
import os, sys
from pipeline import export
for root in sys.argv[1:]:
    export.main(["--root", root])
    if os.geteuid() == 0:
        os.setgid(65534), os.setuid(65534)  # nobody, after the first export has imported everything
"""


def test_a_root_that_may_not_be_written_is_read() -> None:
    with tempfile.TemporaryDirectory() as folder:  # which, unlike pytest's own, others may enter
        Path(folder).chmod(0o755)
        writable, killed, closed = (Path(folder) / name for name in ("writable", "killed", "closed"))
        store = Store(writable)
        create(store, space_with(), name="mine", trials=3, ended=1)
        shutil.copytree(writable, killed)
        store.close()
        shutil.copytree(writable, closed)
        logs = [root.joinpath("mlruns", "optuna.db-wal").exists() for root in (killed, closed)]
        assert logs == [True, False]
        before = [contents(root) for root in (killed, closed)]
        for path in (path for root in (killed, closed) for path in (root, *root.rglob("*"))):
            path.chmod(0o555 if path.is_dir() else 0o444)
        command = [sys.executable, "-c", EXPORTS, *map(str, (writable, killed, closed))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        for path in (path for root in (killed, closed) for path in (root, *root.rglob("*"))):
            path.chmod(0o755)
        assert (done.returncode, done.stderr) == (0, "")
        first, *others = done.stdout.split("# Trial 0 of study mine: ")[1:]
        assert others == [first, first]
        assert [contents(root) for root in (killed, closed)] == before


def test_files_of_a_study_of_another_record_are_not_used(store: Store) -> None:
    folder = store.root / "mlruns" / "studies" / "small-1"
    folder.mkdir(parents=True)
    (folder / "record").write_text("postgresql://me@host/db")
    assert store.choose(space_with(), trials=8, name=None) == ("small-2", False)
    with pytest.raises(InvalidInput, match=r"small-1: .* has the files of a study of another record; name that record"):
        store.choose(space_with(), trials=8, name="small-1")
    with pytest.raises(InvalidInput, match="another record"):
        store.refuse_another_record("small-1", "--delete")
