"""Write a trial as a file that trains again: its config, and the search's record of the trial."""

from __future__ import annotations

import dataclasses
import datetime
import sys
from pathlib import Path
from typing import Any

from pipeline.app import cli
from pipeline.app.answer import Answer
from pipeline.app.display import spread
from pipeline.app.found import record
from pipeline.errors import InvalidInput, Problem, counted
from pipeline.files import strict_yaml
from pipeline.files.atomic import write_atomic
from pipeline.space.load import FOUND
from pipeline.space.trial import EndedTrial, number
from pipeline.study.store import Store
from pipeline.study.study import Study


def export(root: Path, *, study: str | None, trial: int | None, out: Path | None) -> int:
    """Write a trial to a file, or to the terminal; return the exit status.

    Args:
        root: Folder that holds `mlruns/`.
        study: None: the newest.
        trial: Number of the trial; None: the best.
        out: None: the terminal.

    Raises:
        InvalidInput: There is no such study or trial, or the file cannot be written.
    """
    file = None if out is None else cli.writable_out(out)
    opened = Store(root, warn=cli.warn).open(study)
    text = config_file(opened, choose_trial(opened, trial))
    if file is None:
        sys.stdout.write(text)
        return 0
    try:
        write_atomic(file, text)
    except OSError as error:
        raise InvalidInput("--out", [Problem(str(out), f"cannot be written: {error.strerror}")]) from None
    print(f"{out}   train it: python -m pipeline.train {cli.quoted(out or file)}")
    return 0


def config_file(study: Study, trial: EndedTrial) -> str:
    """Return a trial as YAML: its config and objective, and under `found` its metrics, environment and study."""
    objective = study.space.objective
    found: dict[str, Any] = {
        "study": study.name,
        "trial": trial.number,
        "state": trial.state.value,
        "date": datetime.datetime.fromtimestamp(trial.ended).isoformat(timespec="seconds"),
        **record(trial),
    }
    answer = Answer.of(study)
    confirmed = answer.confirmed(trial)
    if confirmed is not None and confirmed.mean is not None:
        values = {str(seed): value for seed, value in confirmed.values.items()}
        found["confirmed"] = {"mean": confirmed.mean, "std": confirmed.std, "values_by_seed": values}
    name = (
        f"Trial {trial.number}"
        if trial.confirms is None
        else f"{trial.confirms}, seed {trial.config.seed}, in the confirmation"
    )
    comment = f"{name} of study {study.name}: {_score_line(study, trial)}."
    if confirmed is not None and confirmed is answer.confirmation.winner:
        comment += f" Confirmed: {objective.metric} {spread(confirmed)} over {len(confirmed.values)} fresh seeds."
    content = {**trial.config.to_dict(), "objective": dataclasses.asdict(objective), FOUND: found}
    return strict_yaml.dumps(content, comment=comment)


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
