"""A training process: a fork that answers calls, and ends with its parent."""

from __future__ import annotations

import multiprocessing.connection
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.files.locks import LOCK
from pipeline.space.config import TrialConfig
from pipeline.space.trial import EpochMetrics
from pipeline.training.process import ProcessDied, TrainingProcess, can_fork

pytestmark = pytest.mark.skipif(not can_fork(), reason="processes are forked on Linux, and not beside CUDA")


class Unlucky(Exception):
    """An exception that cannot be unpickled, since its constructor takes two arguments."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")


class Raises:
    """A trainer that raises."""

    configs: Mapping[int, TrialConfig] = {}

    def __init__(self, configs: Mapping[int, TrialConfig], plain: bool) -> None:
        self.epochs = 0

    def train_epoch(self, *, average: bool = False) -> dict[int, EpochMetrics]:
        """Raise exceptions that can be pickled, and one that cannot."""
        self.epochs += 1
        if self.epochs == 1:
            raise ValueError("no more")
        if self.epochs == 2:
            raise Unlucky("this", "that")
        raise torch.OutOfMemoryError("full")

    def test(self) -> dict[int, dict[str, float]]:
        """Return the id of the trainer's process."""
        return {os.getpid(): {}}


def test_what_is_raised_in_a_process_is_raised_by_who_asked() -> None:
    trials = TrainingProcess(Raises).build({}, plain=True)
    with pytest.raises(ValueError, match=r"^no more$"):
        trials.train_epoch()
    with pytest.raises(RuntimeError, match=r"^Unlucky: this and that$"):
        trials.train_epoch()
    with pytest.raises(torch.OutOfMemoryError, match=r"^full$"):
        trials.train_epoch()


def test_an_interrupted_question_is_not_answered_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    process = TrainingProcess(Raises)
    trials = process.build({}, plain=True)
    assert list(trials.test()) == [process.pid]

    def interrupted(_: Any) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(multiprocessing.connection.Connection, "recv_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trials.test()
    monkeypatch.undo()
    assert process.ended
    with pytest.raises(ProcessDied, match=r"^a process that trained trials has ended"):
        trials.train_epoch()


def test_a_process_has_the_files_of_its_parent_and_none_of_its_connections(tmp_path: Path) -> None:
    theirs, ours = os.pipe()
    with (tmp_path / "notes").open("w") as file, (tmp_path / LOCK).open("w") as lock:
        noted = file.fileno(), lock.fileno(), ours

        class Writes(Raises):
            def model_state(self, number: int) -> list[bool]:
                return [Path(f"/proc/self/fd/{number}").exists() for number in noted]

        found: Any = TrainingProcess(Writes).build({}, plain=True).model_state(0)
        assert found == [True, False, False]
    os.close(ours)
    os.close(theirs)


def test_a_process_that_was_killed_says_so() -> None:
    process = TrainingProcess(Raises)
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(ProcessDied, match=r"^a process that trained trials has ended, killed by signal 9$"):
        process.build({}, plain=True)


def test_a_process_leaves_signals_to_its_parent() -> None:
    process = TrainingProcess(Raises)
    trials = process.build({}, plain=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(process.pid, number)
    assert list(trials.test()) == [process.pid]


def test_a_process_that_is_ended_is_gone_even_a_stopped_one() -> None:
    processes = [TrainingProcess(Raises) for _ in range(2)]
    os.kill(processes[0].pid, signal.SIGSTOP)
    for process in processes:
        process.end()
    assert not any(Path(f"/proc/{process.pid}").exists() for process in processes)


PARENT = """
import os, sys
from test_process import Raises
from pipeline.training.process import TrainingProcess

processes = [TrainingProcess(Raises) for _ in range(2)]
print(*[process.pid for process in processes], flush=True)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("how", ["at its end", "killed"])
def test_a_process_ends_with_its_parent(how: str, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, str(script), how]
    # The pipe ends when the last process that could write to it has ended.
    ended = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, timeout=120)
    assert len(ended.stdout.split()) == 2
    assert ended.returncode == (-9 if how == "killed" else 0)
