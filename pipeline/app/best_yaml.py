"""Write a trial as a file that trains again: its config, and the search's record of the trial."""

from __future__ import annotations

import dataclasses
import datetime
from typing import Any

from pipeline.app.found import record
from pipeline.errors import InvalidInput, Problem, counted
from pipeline.files import strict_yaml
from pipeline.space.load import FOUND
from pipeline.space.trial import EndedTrial, number
from pipeline.study.study import Study


def config_file(study: Study, trial: EndedTrial) -> str:
    """Return a trial as YAML: `config_content`, below a line that says which trial it is."""
    comment = f"Trial {trial.number} of study {study.name}: {_score_line(study, trial)}."
    return strict_yaml.dumps(config_content(study, trial), comment=comment)


def config_content(study: Study, trial: EndedTrial) -> dict[str, Any]:
    """Return a trial as plain values: config and objective, and under `found` its metrics, environment and study."""
    objective = study.space.objective
    found: dict[str, Any] = {
        "study": study.name,
        "trial": trial.number,
        "state": trial.state.value,
        "date": datetime.datetime.fromtimestamp(trial.ended).isoformat(timespec="seconds"),
        **record(trial),
    }
    return {**trial.config.to_dict(), "objective": dataclasses.asdict(objective), FOUND: found}


def choose_trial(study: Study, number: int | None) -> EndedTrial:
    """Return a trial of a study by its number; None: the best.

    Raises:
        InvalidInput: There is no such trial, or no trial is complete.
    """
    if number is not None:
        if number < len(study.ended):
            return study.ended[number]
        last = f"the last of {study.name} is {len(study.ended) - 1}" if study.ended else f"{study.name} has none yet"
        raise InvalidInput("--trial", [Problem(str(number), f"there is no such trial; {last}")])
    best = study.best()
    if not best:
        message = "no trial is complete: each was pruned, diverged or failed; name one with --trial"
        raise InvalidInput("--study", [Problem(study.name, message)])
    return best[0]


def _score_line(study: Study, trial: EndedTrial) -> str:
    found = record(trial)
    if "value" not in found:
        return f"{trial.state.value}, {trial.reason}"
    after = f"after {counted(found['epoch'], 'epoch')}"
    if study.space.objective.of == "best":
        after = f"at epoch {found['epoch']} of {len(trial.epochs)}"
    return f"{study.space.objective.metric} {number(found['value'])} {after}, {trial.state.value}"
