"""Keep the models of the trials that may win a study, one file each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
        self._leading = self._may_win(study.best(len(study.ended)))
        """Number of each trial that may win to the trial. A trial that may not never will: later trials only add."""

    def offer(self, trial: EndedTrial, state: Callable[[], Mapping[str, Any]]) -> None:
        """Keep the model of an ended trial that may win, and remove the models of trials that no longer may.

        Args:
            trial: The trial.
            state: Returns the trial's model state.
        """
        if trial.state is not TrialState.COMPLETE or self._study.space.objective.of == "best":
            return
        self._leading = self._may_win([*self._leading.values(), trial])
        if trial.number not in self._leading:
            return
        path = model_file(self._folder, trial.number)
        leading = {model_file(self._folder, number) for number in self._leading}
        content = dict(state())
        try:
            with opened_atomic(path) as file:
                torch.save(content, file)
            for other in set(self._folder.glob("trial-*.pt")) - leading:
                other.unlink()
        except OSError as error:
            self._warn(f"{path}: cannot be written: {error.strerror}; the search goes on without it")

    def _may_win(self, complete: Sequence[EndedTrial]) -> dict[int, EndedTrial]:
        """Return the trials that may win among some that are complete: the search's first and the finalists."""
        if not complete:
            return {}
        space = self._study.space
        first = min(complete, key=space.objective.order)
        return {t.number: t for t in [first, *finalists(complete, space, count=space.confirm.finalists)]}


def model_file(folder: Path, number: int) -> Path:
    """Return the path of a trial's model in the folder of a study's models."""
    return folder / f"trial-{number:06}.pt"
