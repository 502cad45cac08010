"""Write a trial as a file that trains again: its config, and the search's record of the trial."""

from __future__ import annotations

import dataclasses
import datetime
from typing import Any

from pipeline.app.answer import Answer
from pipeline.app.display import spread
from pipeline.app.found import record
from pipeline.errors import InvalidInput, Problem, counted
from pipeline.files import strict_yaml
from pipeline.space.load import FOUND
from pipeline.space.trial import EndedTrial, number
from pipeline.study.study import Study


def config_file(study: Study, trial: EndedTrial) -> str:
    """Return a trial as YAML: `config_content` below `config_comment`."""
    return strict_yaml.dumps(config_content(study, trial), comment=config_comment(study, trial))


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
    confirmed = Answer.of(study).confirmed(trial)
    if confirmed is not None and confirmed.mean is not None:
        values = {str(seed): value for seed, value in confirmed.values.items()}
        found["confirmed"] = {"mean": confirmed.mean, "std": confirmed.std, "values_by_seed": values}
    return {**trial.config.to_dict(), "objective": dataclasses.asdict(objective), FOUND: found}


def config_comment(study: Study, trial: EndedTrial) -> str:
    """Return a line that says which trial it is, and how good."""
    answer = Answer.of(study)
    confirmed = answer.confirmed(trial)
    name = (
        f"Trial {trial.number}"
        if trial.confirms is None
        else f"{trial.confirms}, seed {trial.config.seed}, in the confirmation"
    )
    comment = f"{name} of study {study.name}: {_score_line(study, trial)}."
    if confirmed is not None and confirmed is answer.confirmation.winner:
        metric = study.space.objective.metric
        comment += f" Confirmed: {metric} {spread(confirmed)} over {len(confirmed.values)} fresh seeds."
    return comment


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
    best = Answer.of(study).trial
    if best is None:
        message = "no trial is complete: each was pruned, diverged or failed; name one with --trial"
        raise InvalidInput("--study", [Problem(study.name, message)])
    return best


def _score_line(study: Study, trial: EndedTrial) -> str:
    found = record(trial)
    if "value" not in found:
        return f"{trial.state.value}, {trial.reason}"
    after = f"after {counted(found['epoch'], 'epoch')}"
    if study.space.objective.of == "best":
        after = f"at epoch {found['epoch']} of {len(trial.epochs)}"
    return f"{study.space.objective.metric} {number(found['value'])} {after}, {trial.state.value}"
