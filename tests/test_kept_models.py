"""The models of trials that may win stay as files; all others go."""

from __future__ import annotations

import dataclasses
import errno
from pathlib import Path

import pytest
import torch
from test_confirmation import ended_trial, searched, space_with

from pipeline.space.search_space import Objective
from pipeline.space.trial import TrialState
from pipeline.study import models
from pipeline.study.models import Models, model_file
from pipeline.study.store import Store

LATE_BEST, LAST_BEST, WORST = 0.3, 0.1, 0.03
"""Rates of trials whose accuracies are the best over the last epochs, the best after the last, and the worst."""


def kept(folder: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("trial-")) for path in folder.glob("*"))


def test_the_models_of_the_best_trial_and_of_the_finalists_stay(tmp_path: Path) -> None:
    space = space_with(confirm={"finalists": 2})
    study = searched(Store(tmp_path), space, rates=())
    keeper = Models(tmp_path / "models", study, warn=pytest.fail)
    seen = []
    for number, rate in enumerate((WORST, LATE_BEST, LAST_BEST, WORST)):
        keeper.offer(ended_trial(number, rate, space), lambda n=number: {"weight": torch.tensor(n)})  # type: ignore[misc]
        seen.append(kept(tmp_path / "models"))
    assert seen == [[0], [0, 1], [1, 2], [1, 2]]
    assert torch.load(model_file(tmp_path / "models", 2), weights_only=True) == {"weight": torch.tensor(2)}


def test_a_search_that_goes_on_knows_the_trials_before(tmp_path: Path) -> None:
    space = space_with(confirm={"finalists": 1})
    study = searched(Store(tmp_path), space, rates=(LATE_BEST, LAST_BEST))
    Models(tmp_path / "models", study, warn=pytest.fail).offer(ended_trial(2, WORST, space), pytest.fail)
    assert kept(tmp_path / "models") == []


def test_a_trial_that_cannot_win_and_an_objective_of_the_best_epoch_leave_no_model(tmp_path: Path) -> None:
    space = space_with()
    pruned = dataclasses.replace(ended_trial(0, LAST_BEST, space), state=TrialState.PRUNED)
    Models(tmp_path / "models", searched(Store(tmp_path), space, rates=()), warn=pytest.fail).offer(pruned, pytest.fail)
    best = space_with(objective=dataclasses.asdict(Objective(of="best")))
    study = searched(Store(tmp_path), best, name="best", rates=())
    Models(tmp_path / "models", study, warn=pytest.fail).offer(ended_trial(0, LAST_BEST, best), pytest.fail)
    assert not (tmp_path / "models").exists()


def test_a_model_that_cannot_be_written_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(models, "opened_atomic", full)
    space, said = space_with(), list[str]()
    study = searched(Store(tmp_path), space, rates=())
    Models(tmp_path / "models", study, warn=said.append).offer(ended_trial(0, LAST_BEST, space), dict)
    path = model_file(tmp_path / "models", 0)
    assert said == [f"{path}: cannot be written: No space left on device; the search goes on without it"]
