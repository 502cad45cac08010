import csv
import dataclasses
import os
import queue
import signal
from collections.abc import Collection, Mapping
from pathlib import Path

import pytest
from test_mlflow import CLOSE_S, DONE, begun, ended, epoch, study

from pipeline.errors import InvalidInput, Problem
from pipeline.space.trial import BegunTrial, EndedTrial, EpochMetrics
from pipeline.tracking.process import TrackerProcess
from pipeline.tracking.server import trials_ending
from pipeline.tracking.tracker import StoredTrial, StudyInfo, StudySummary


class Table:
    """A second tracker: a CSV file per study."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __str__(self) -> str:
        return f"tables in {self.root}"

    def load(self) -> None: ...

    def open(self, study: StudyInfo) -> str:
        self.path = self.root / f"{study.name}.csv"
        return f"open {self.path}"

    def recorded(self) -> set[int]:
        return {int(row[0]) for row in self.rows()}

    def begin(self, trial: BegunTrial) -> None: ...

    def epochs(self, metrics: Mapping[int, EpochMetrics], at: float) -> None: ...

    def flush(self, ending: Collection[int]) -> None: ...

    def end(self, trial: EndedTrial) -> None:
        if str(trial.number) not in [row[0] for row in self.rows()]:
            with self.path.open("a", newline="") as file:
                csv.writer(file).writerow([trial.number, trial.state, trial.value])

    def finish(self, summary: StudySummary) -> None:
        self.path.with_suffix(".txt").write_text(summary.note)

    def close(self) -> list[str]:
        return ["the disk is nearly full"]

    def delete(self, study: str, *, identity: str) -> list[str]:
        (self.root / f"{study}.csv").unlink()
        return []

    def rows(self) -> list[list[str]]:
        return list(csv.reader(self.path.read_text().splitlines())) if self.path.exists() else []


class Unfinished(Table):
    """Fails each time a trial of an even number is recorded."""

    def end(self, trial: EndedTrial) -> None:
        if trial.number % 2 == 0:
            raise ValueError("an even number")


class Closed(Table):
    """Cannot be opened."""

    def open(self, study: StudyInfo) -> str:
        raise PermissionError(13, "Permission denied", "/somewhere")


class Told(Table):
    """Notes every call in a file of its own."""

    def open(self, study: StudyInfo) -> str:
        self.note("open")
        return super().open(study)

    def begin(self, trial: BegunTrial) -> None:
        self.note("begin", trial.number)

    def epochs(self, metrics: Mapping[int, EpochMetrics], at: float) -> None:
        for number, measured in metrics.items():
            self.note("epoch", number, measured.epoch)

    def end(self, trial: EndedTrial) -> None:
        self.note("end", trial.number)

    def note(self, *words: object) -> None:
        with (self.root / "told").open("a") as file:
            print(*words, file=file)


class Refused(Table):
    def __init__(self, root: Path) -> None:
        raise InvalidInput(str(root), [Problem("", "must be another folder")])


def record(root: Path, *trackers: type[Table]) -> tuple[list[str], list[str]]:
    """Have three trials recorded, one of them twice; return the links and the warnings."""
    process = TrackerProcess(root, trackers=trackers)
    process.open(study("mine"))
    for number in (0, 1, 2, 1):
        process.end(ended(number))
    process.finish(DONE)
    return process.links(), process.close(stalled_s=CLOSE_S)


def test_a_second_tracker_records_every_trial_once(tmp_path: Path) -> None:
    links, warnings = record(tmp_path, Table)
    assert links == [f"open {tmp_path / 'mine.csv'}"]
    assert warnings == [f"tables in {tmp_path}: the disk is nearly full"]
    assert (tmp_path / "mine.csv").read_text().splitlines() == ["0,complete,0.9", "1,complete,0.9", "2,complete,0.9"]
    assert (tmp_path / "mine.txt").read_text() == "done"


@pytest.mark.parametrize(
    ("failing", "warning"),
    [
        (Closed, "Permission denied; 3 trials and the summary are not recorded"),
        (Unfinished, "an even number; 2 trials are not recorded"),
    ],
)
def test_a_tracker_that_fails_leaves_the_others_alone(failing: type[Table], warning: str, tmp_path: Path) -> None:
    links, warnings = record(tmp_path, failing, Table)
    assert links[-1] == f"open {tmp_path / 'mine.csv'}"
    assert warnings[0] == f"tables in {tmp_path}: {warning}"
    assert len((tmp_path / "mine.csv").read_text().splitlines()) == 3


def test_of_trials_that_ended_before_the_search_went_on_only_those_that_a_tracker_lacks_are_untold(
    tmp_path: Path,
) -> None:
    record(tmp_path, Table)
    before = tuple(StoredTrial.of(ended(number)) for number in range(5))
    process = TrackerProcess(tmp_path, trackers=[Table])
    process.open(dataclasses.replace(study("mine"), ended=before))
    assert process.untold(wait=True) == [3, 4]
    process.end(ended(3))
    assert process.untold() == [4]
    process.end(ended(4))
    process.finish(DONE)
    assert (process.untold(), process.close(stalled_s=CLOSE_S)[1:], process.incomplete) == ([], [], False)
    assert [row.partition(",")[0] for row in (tmp_path / "mine.csv").read_text().splitlines()] == list("01234")


def test_what_a_tracker_that_cannot_be_opened_lacks_is_missing_with_the_reason(tmp_path: Path) -> None:
    process = TrackerProcess(tmp_path, trackers=[Closed])
    process.open(dataclasses.replace(study(), ended=tuple(StoredTrial.of(ended(number)) for number in range(3))))
    assert process.untold(wait=True) == []
    process.finish(DONE)
    expected = "Permission denied; 3 trials and the summary are not recorded"
    assert process.close(stalled_s=CLOSE_S) == [f"tables in {tmp_path}: {expected}"]
    assert process.incomplete


def test_the_trials_whose_end_is_told_next_are_known_from_the_messages_that_wait() -> None:
    messages = [("begin", (begun(1),)), ("end", (ended(2),)), ("idle", ()), ("end", (ended(3),)), None]
    assert trials_ending(messages) == {2, 3}


def test_a_killed_process_begins_again_and_is_told_once_more_what_is_not_recorded(tmp_path: Path) -> None:
    process = TrackerProcess(tmp_path, trackers=[Told])
    process.open(study())
    process.end(ended(0))
    while process.missing:
        pass
    process.begin(begun(1))
    process.epoch({1: epoch(1)})
    os.kill(process.pid, signal.SIGKILL)
    process.epoch({1: epoch(2)})
    process.end(ended(1))
    process.finish(DONE)
    assert process.close(stalled_s=CLOSE_S) == [f"tables in {tmp_path}: the disk is nearly full"]
    assert not process.incomplete
    before, again = (tmp_path / "told").read_text().split("open\n")[1:]
    assert before.startswith("end 0\n")
    assert again.splitlines() == ["begin 1", "epoch 1 1", "epoch 1 2", "end 1"]


def test_a_process_that_is_killed_before_the_study_is_known_begins_again(tmp_path: Path) -> None:
    process = TrackerProcess(tmp_path, trackers=[Table])
    os.kill(process.pid, signal.SIGKILL)
    process.open(study("mine"))
    process.end(ended())
    assert process.close(stalled_s=CLOSE_S) == [f"tables in {tmp_path}: the disk is nearly full"]
    assert (tmp_path / "mine.csv").read_text().splitlines() == ["0,complete,0.9"]


def test_a_tracker_that_refuses_the_root_ends_the_search_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"1 problem\n  must be another folder$"):
        TrackerProcess(tmp_path, trackers=(Table, Refused))
    assert list(tmp_path.iterdir()) == []


def test_the_process_of_trackers_imports_nothing_from_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pipeline", "random", "sqlite3"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write(__name__)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")  # as `python -m` and notebooks have it
    tracker = TrackerProcess(tmp_path, trackers=[Table])
    tracker.open(study())
    assert tracker.close(stalled_s=CLOSE_S) == [f"tables in {tmp_path}: the disk is nearly full"]
    assert not (tmp_path / "ran").exists()


class Away(Table):
    """Cannot be reached until a file is there."""

    def open(self, study: StudyInfo) -> str:
        if not (self.root / "back").exists():
            raise ConnectionRefusedError(111, "Connection refused")
        return super().open(study)


def test_a_tracker_that_is_away_is_told_at_once_and_records_what_it_missed_once_it_is_back(tmp_path: Path) -> None:
    said: queue.SimpleQueue[str] = queue.SimpleQueue()
    process = TrackerProcess(tmp_path, trackers=[Away], warn=said.put)
    process.open(study("mine"))
    process.begin(begun(0))
    process.epoch({0: epoch(1)})
    process.end(ended(0))
    name = f"tables in {tmp_path}"
    assert (
        said.get(timeout=CLOSE_S)
        == f"{name}: Connection refused; the search goes on, and tries again every few seconds"
    )
    (tmp_path / "back").touch()
    assert said.get(timeout=CLOSE_S) == f"{name}: records again, also what it has missed"
    process.finish(DONE)
    assert process.close(stalled_s=CLOSE_S) == [f"{name}: the disk is nearly full"]
    assert not process.incomplete
    assert (tmp_path / "mine.csv").read_text().splitlines() == ["0,complete,0.9"]
