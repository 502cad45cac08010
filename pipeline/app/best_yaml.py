"""A trial as a file that trains again: its config, and what the search found with it."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Any

from pipeline.errors import InvalidInput, Problem
from pipeline.space.trial import EndedTrial, number

if TYPE_CHECKING:
    from pipeline.study.study import Study


def config_file(study: Study, trial: EndedTrial) -> str:
    """Return a trial as YAML: its config, and under `found` its score and where it comes from."""
    from pipeline.files import strict_yaml
    from pipeline.space.load import FOUND

    found: dict[str, Any] = {
        "study": study.name,
        "trial": trial.number,
        "state": trial.state.value,
        "objective": {"metric": study.space.objective.metric, "direction": study.space.objective.direction},
        "epochs": len(trial.epochs),
        "metrics": dict(trial.metrics),
        "date": datetime.datetime.fromtimestamp(trial.ended).isoformat(timespec="seconds"),
        "environment": dict(trial.environment),
    }
    comment = f"Trial {trial.number} of study {study.name}: {_score_line(study, trial)}."
    return strict_yaml.dumps({**trial.config.to_dict(), FOUND: found}, comment=comment)


def choose_trial(study: Study, number: int | None) -> EndedTrial:
    """Return a trial of a study by number, or its best.

    Raises:
        InvalidInput: There is no such trial.
    """
    if number is not None:
        if number >= len(study.ended):
            last = (
                f"the last of {study.name} is {len(study.ended) - 1}" if study.ended else f"{study.name} has none yet"
            )
            raise InvalidInput("--trial", [Problem(str(number), f"there is no such trial; {last}")])
        return study.ended[number]
    best = study.best()
    if not best:
        message = "no trial is complete: each was pruned, diverged or failed; name one with --trial"
        raise InvalidInput("--study", [Problem(study.name, message)])
    return best[0]


def _score_line(study: Study, trial: EndedTrial) -> str:
    metric = study.space.objective.metric
    if metric not in trial.metrics:
        return f"{trial.state.value}, {trial.reason}"
    return f"{metric} {number(trial.metrics[metric])} after {len(trial.epochs)} epochs, {trial.state.value}"
