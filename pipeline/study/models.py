"""Keep the models of the trials that may win a study, one file each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.files.atomic import opened_atomic
from pipeline.space.trial import EndedTrial, TrialState
from pipeline.study.candidates import finalists
from pipeline.study.study import Study


class Models:
    """The models of a study's best trial and of those that a confirmation trains again, trained on the search's seed.

    A file holds a state dict, which `torch.load(…, weights_only=True)` reads. With an objective of the best epoch there
    are no files, since a trial ends with the model of its last.

    Args:
        folder: Holds only these files; the first one makes it.
        study: The study.
        warn: Takes one sentence about a file that cannot be written.
    """

    def __init__(self, folder: Path, study: Study, *, warn: Callable[[str], None]) -> None:
        self._folder, self._study, self._warn = folder, study, warn
        self._complete = {trial.number: trial for trial in study.best(len(study.ended))}

    def offer(self, trial: EndedTrial, state: Callable[[], Mapping[str, Any]]) -> None:
        """Keep the model of an ended trial that may win, and remove the models of trials that no longer may.

        Args:
            trial: The trial.
            state: Returns the trial's model state.
        """
        if trial.state is not TrialState.COMPLETE or self._study.space.objective.of == "best":
            return
        self._complete[trial.number] = trial
        leading = {model_file(self._folder, number) for number in self._leading()}
        if (path := model_file(self._folder, trial.number)) not in leading:
            return
        content = dict(state())
        try:
            with opened_atomic(path) as file:
                torch.save(content, file)
            for other in set(self._folder.glob("trial-*.pt")) - leading:
                other.unlink()
        except OSError as error:
            self._warn(f"{path}: cannot be written: {error.strerror}; the search goes on without it")

    def _leading(self) -> set[int]:
        """Return the numbers of the trials that may win among those that have ended."""
        space = self._study.space
        objective, count = space.objective, space.confirm.finalists
        trials = self._complete.values()
        return {trial.number for trial in [min(trials, key=objective.order), *finalists(trials, space, count=count)]}


def model_file(folder: Path, number: int) -> Path:
    """Return the path of a trial's model in the folder of a study's models."""
    return folder / f"trial-{number:06}.pt"
