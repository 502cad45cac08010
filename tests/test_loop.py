"""The loop that drives a group, when memory runs out, a process dies or a trial raises in mid-run."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from pretended import DEVICE, pretended_device
from tiny import on_device, tiny_workload
from torch import Tensor

from pipeline.space.load import space_from_document
from pipeline.space.placement import Placement, PlacementRules, from_run_lengths
from pipeline.space.trial import EndedTrial, EpochMetrics, TrialState
from pipeline.study.checkpoint import Checkpoints
from pipeline.study.loop import run_group
from pipeline.study.store import Store
from pipeline.study.study import Study
from pipeline.training import executor as executors
from pipeline.training.executor import LocalExecutor
from pipeline.training.process import RemoteTrials, can_fork
from pipeline.training.rows.trainer import FusedTrials
from pipeline.training.shards import ShardedTrials
from pipeline.workloads.workload import Batch

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
TRIALS, EPOCHS = 8, 6
DOCUMENT: dict[str, Any] = {
    "workload": {"name": "digits", "model": "mlp"},
    "epochs": EPOCHS,
    "batch_size": 8,
    "optimizer": {"sgd": {"base_lr": {"low": 1e-2, "high": 0.5, "log": True}}},
    "scheduler": {"exponential": {"gamma": {"low": 0.5, "high": 0.9}}},
    "param_groups": {"all": {"pattern": "*"}},
    "pruner": {"name": "median", "n_startup_trials": 2, "n_warmup_epochs": 2},
    "sampler": {"name": "random", "group_size": 8},
}
"""A space whose configs also fit the tiny problem."""


@dataclass
class Search:
    """A search of one group of eight trials: epochs told, warnings, ended trials."""

    study: Study
    told: list[Mapping[int, EpochMetrics]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def outcomes(self) -> list[tuple[Any, ...]]:
        return [(t.number, t.state, t.reason, t.value, [e.metrics for e in t.epochs]) for t in self.study.ended]

    def placements(self, number: int) -> list[Placement]:
        return from_run_lengths(self.study.ended[number].environment["placement"])


def search(
    root: Path,
    *,
    device: torch.device = CPU,
    processes: int = 1,
    saves_after: int = 1,
    after_epoch: Callable[[int, ShardedTrials], None] = lambda epoch, group: None,
) -> Search:
    """Run a search that saves a checkpoint after one epoch, and call a function after each epoch."""
    space = space_from_document(DOCUMENT, name="tiny")
    workload = on_device(tiny_workload(), device=device)
    executor = LocalExecutor(workload, space.example(), device=device, processes=processes)
    store = Store(root)
    found = Search(store.create(space, name="mine", trials=4 * TRIALS, rules=executor.rules))

    class SavesOnce(Checkpoints):
        def due(self) -> bool:
            return len(found.told) == saves_after

    checkpoints = SavesOnce(store.folder("mine") / "checkpoints", warn=found.warnings.append)
    proposals = found.study.next_group(4 * TRIALS)
    assert len(proposals) == TRIALS
    group = executor.build({number: config for number, (config, _) in proposals.items()})
    assert isinstance(group, ShardedTrials)

    def on_epoch(results: Mapping[int, EpochMetrics]) -> None:
        found.told.append(results)
        after_epoch(len(found.told), group)

    for trials in run_group(
        group,
        proposals,
        found.study,
        checkpoints=checkpoints,
        environment={"device": device.type},
        on_epoch=on_epoch,
        interrupted=lambda: False,
        rules=lambda: executor.rules,
    ):
        found.study.add(*trials)
    executor.close()
    return found


class Limited(FusedTrials):
    """Runs out of memory with more than `fits` rows."""

    fits = 1_000

    def gradients(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Raise as a device does when its memory is full."""
        if len(self.configs) > Limited.fits:
            raise torch.OutOfMemoryError("full")
        return super().gradients(batch)


def test_memory_that_runs_out_in_mid_run_leaves_what_was_told_and_goes_on_with_fewer_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = search(tmp_path / "whole")
    monkeypatch.setattr(executors, "FusedTrials", Limited)

    def fill(epoch: int, group: ShardedTrials) -> None:
        if epoch == 3:
            Limited.fits = 2

    try:
        with pretended_device():
            found = search(tmp_path / "device", device=DEVICE, after_epoch=fill)
    finally:
        Limited.fits = 1_000
    (warning,) = found.warnings
    left = len(found.told[3])  # trials of the epoch in which memory ran out
    assert warning.startswith(f"memory ran out with {left} trials in a matrix; from now on there are at most ")
    assert found.study.rules.row_limit is not None
    assert Store(tmp_path / "device").open("mine").rules.row_limit == found.study.rules.row_limit
    # Up to this epoch, metrics and verdicts equal those of the search with enough memory.
    assert [{n: m.metrics for n, m in epoch.items()} for epoch in found.told[:3]] == [
        {n: m.metrics for n, m in epoch.items()} for epoch in expected.told[:3]
    ]
    assert [t.state for t in found.study.ended] == [t.state for t in expected.study.ended]
    last = [t.number for t in found.study.ended if t.state is TrialState.COMPLETE]
    assert last
    for number in last:
        placements = found.placements(number)
        assert [bool(placement.broken) for placement in placements] == [False] * 3 + [True] * 3
        assert all((placement.rows or 0) <= 2 for placement in placements[3:])
        assert found.study.ended[number].value == pytest.approx(expected.study.ended[number].value, abs=0.11)


@pytest.mark.skipif(not can_fork(), reason="processes are forked on Linux, and not beside CUDA")
@pytest.mark.parametrize("after", [1, 2, 4])
def test_a_process_that_is_killed_changes_nothing(after: int, tmp_path: Path) -> None:
    def kill(epoch: int, group: ShardedTrials) -> None:
        remote = [trainer for trainer in group._trainers if isinstance(trainer, RemoteTrials)]
        if epoch == after and remote:
            os.kill(remote[0].process.pid, signal.SIGKILL)

    expected = search(tmp_path / "whole", processes=2)
    found = search(tmp_path / "killed", processes=2, after_epoch=kill)
    assert found.told == expected.told
    assert found.outcomes() == expected.outcomes()
    assert len(found.warnings) == 1
    assert found.warnings[0].startswith("a process that trained trials has ended, killed by signal 9; its trials go on")
    assert not any(placement.broken for trial in found.study.ended for placement in found.placements(trial.number))


class Poisoned(FusedTrials):
    """Raises in the fourth epoch while the bad trial is among the rows."""

    def gradients(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Raise as a model might."""
        if self._epoch == 3 and Poisoned.bad in self.configs:
            raise ValueError("poison")
        return super().gradients(batch)

    bad = -1


def test_a_trial_that_raises_in_a_matrix_fails_and_the_others_end_as_they_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = search(tmp_path / "whole")
    complete = [trial.number for trial in expected.study.ended if trial.state is TrialState.COMPLETE]
    monkeypatch.setattr(executors, "FusedTrials", Poisoned)
    monkeypatch.setattr(Poisoned, "bad", complete[0])
    found = search(tmp_path / "poisoned")
    failed = found.study.ended[complete[0]]
    assert (failed.state, len(found.placements(failed.number))) == (TrialState.FAILED, 3)
    assert (failed.reason or "").startswith("ValueError: poison, in ")
    assert [metrics.metrics for metrics in failed.epochs[:3]] == metrics_of(expected.study.ended[complete[0]], 3)
    others = [trial for trial in found.study.ended if trial.number != complete[0]]
    assert {trial.state for trial in others} <= {TrialState.COMPLETE, TrialState.PRUNED}
    for trial in others:
        assert [metrics.metrics for metrics in trial.epochs[:3]] == metrics_of(expected.study.ended[trial.number], 3)
    assert len(found.warnings) == 1
    assert found.warnings[0] == "ValueError: poison; finding which trial raises it"


def metrics_of(trial: EndedTrial, epochs: int) -> list[Mapping[str, float]]:
    return [metrics.metrics for metrics in trial.epochs[:epochs]]


def test_a_row_limit_that_fell_is_in_a_checkpoint_before_it_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executors, "FusedTrials", Limited)

    def fill(epoch: int, group: ShardedTrials) -> None:
        if epoch == 3:
            Limited.fits = 2

    def die(self: Study, rules: PlacementRules) -> None:
        if rules.row_limit != self.rules.row_limit:
            raise KeyboardInterrupt

    keep_rules = Study.keep_rules
    monkeypatch.setattr(Study, "keep_rules", die)
    try:
        with pytest.raises(KeyboardInterrupt):
            search(tmp_path, after_epoch=fill)
        monkeypatch.setattr(Study, "keep_rules", keep_rules)
        checkpoints = Checkpoints(Store(tmp_path).folder("mine") / "checkpoints", warn=pytest.fail)
        _, content = next(checkpoints.load())
        study = Store(tmp_path).open("mine")
    finally:
        Limited.fits = 1_000
    assert content["epoch"] == 4
    assert content["row_limit"] < (study.rules.row_limit or 1_000)


def test_a_trial_that_raises_as_epochs_are_trained_again_has_failed_with_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unlucky(FusedTrials):
        bad = False

        def gradients(self, batch: Batch) -> tuple[Tensor, Tensor]:
            if Unlucky.bad and self._epoch == 1:
                raise OSError("gone")
            return super().gradients(batch)

    monkeypatch.setattr(executors, "FusedTrials", Unlucky)

    def lose(epoch: int, group: ShardedTrials) -> None:
        if epoch == 3:
            group._lost = "a process has died"
            Unlucky.bad = True

    found = search(tmp_path, after_epoch=lose)
    failed = [trial for trial in found.study.ended if trial.state is TrialState.FAILED]
    assert failed
    assert {(trial.reason or "").split(", in")[0] for trial in failed} == {"OSError: gone"}
    assert not [trial for trial in found.study.ended if trial.state is TrialState.DIVERGED]
