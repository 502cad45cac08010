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
from pipeline.study.candidates import ADAM, SGD_STEP
from pipeline.study.study import Study

BASELINE_LABELS = {"adam": ADAM, "sgd": SGD_STEP}
"""Name of a baseline on the command line to its label."""


def config_file(study: Study, trial: EndedTrial) -> str:
    """Return a trial as YAML: `config_content` below `config_comment`."""
    return strict_yaml.dumps(config_content(study, trial), comment=config_comment(study, trial))


def config_content(study: Study, trial: EndedTrial) -> dict[str, Any]:
    """Return a trial as plain values: config and objective, and under `found` its metrics, environment and study."""
    objective = study.space.objective
    found: dict[str, Any] = {
        "study": study.name,
        **({"trial": trial.number} if trial.confirms is None else {"confirms": trial.confirms}),
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
    name = trial_name(trial)
    comment = f"{name[0].upper()}{name[1:]} of study {study.name}: {_score_line(study, trial)}."
    if confirmed is not None and confirmed is answer.confirmation.winner:
        metric = study.space.objective.metric
        comment += f" Confirmed: {metric} {spread(confirmed)} over {len(confirmed.values)} fresh seeds."
    return comment


def trial_name(trial: EndedTrial) -> str:
    """Return how a sentence names a trial, or a run of the confirmation."""
    if trial.confirms is None:
        return f"trial {trial.number}"
    return f"the run of {trial.confirms} with seed {trial.config.seed} in the confirmation"


def choose_trial(study: Study, trial: int | str | None, seed: int | None = None) -> EndedTrial:
    """Return a trial of a study, or a run of its confirmation.

    Args:
        study: The study.
        trial: Number of a trial, or name of a baseline, "adam" or "sgd"; None: the winner.
        seed: Seed of the run of the confirmation; None: the trial itself, or a baseline's run with the first seed.

    Raises:
        InvalidInput: There is no such trial or run, or no trial is complete.
    """
    if seed is not None or isinstance(trial, str):
        return _run_of(study, trial, seed)
    number = trial
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


def _run_of(study: Study, trial: int | str | None, seed: int | None) -> EndedTrial:
    """Return a run of the confirmation."""
    answer = Answer.of(study)
    label = BASELINE_LABELS[trial] if isinstance(trial, str) else f"#{trial}"
    if trial is None and answer.trial is not None:
        label = answer.trial.confirms or f"#{answer.trial.number}"
    runs = {(run.confirms, run.config.seed): run for run in answer.confirmation.runs}
    found = next((run for (name, own), run in runs.items() if name == label and seed in (None, own)), None)
    if found is None:
        there = sorted({f"{name} with seed {own}" for name, own in runs})
        known = f"there are {', '.join(there)}" if there else "the study has none; see python -m pipeline.confirm"
        wanted = label if seed is None else f"{label} with seed {seed}"
        place = "--seed" if seed is not None else "--trial"
        raise InvalidInput(place, [Problem(wanted, f"is no run of the confirmation; {known}")])
    return found


def _score_line(study: Study, trial: EndedTrial) -> str:
    found = record(trial)
    if "value" not in found:
        return f"{trial.state.value}, {trial.reason}"
    after = f"after {counted(found['epoch'], 'epoch')}"
    if study.space.objective.of == "best":
        after = f"at epoch {found['epoch']} of {len(trial.epochs)}"
    return f"{study.space.objective.metric} {number(found['value'])} {after}, {trial.state.value}"
