"""Write the report of a study: gather what the page needs, and write the page."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
from collections.abc import Mapping
from pathlib import Path

from pipeline.app import cli
from pipeline.app.answer import Answer
from pipeline.app.export import trial_code
from pipeline.app.options import IN_PYTHON
from pipeline.errors import InvalidInput, Problem
from pipeline.files.atomic import write_atomic
from pipeline.page.confirmed import Comparison, Confirmed, ConfirmedStrategy
from pipeline.page.page import build_page
from pipeline.page.results import Importance, StudyResults
from pipeline.space.config import Own
from pipeline.space.trial import EndedTrial
from pipeline.study.certainty import residual_deviation
from pipeline.study.importance import importances
from pipeline.study.store import Store
from pipeline.study.study import Study
from pipeline.training.optim import replay_rates

DRAWN = 5
"""Trials whose learning rates are drawn."""
REPORT = "report.html"


def report(root: Path, storage: str | None, *, study: str | None, out: Path | None) -> int:
    """Write the report of a stored study, by default into the study's folder; return the exit status.

    Raises:
        InvalidInput: There is no such study, or the file cannot be written.
    """
    file = None if out is None else cli.writable_out(out)
    with contextlib.closing(Store(root, cli.chosen_storage(storage), warn=cli.warn)) as store:
        opened = store.open(study)
        path = store.folder(opened.name) / REPORT if file is None else file
        if file is None:
            cli.refuse_unwritable(path, "--root")
        try:
            write_report(Answer.of(opened), store, path)
        except OSError as error:
            raise InvalidInput("--out", [Problem(str(path), f"cannot be written: {error.strerror}")]) from None
    print(f"report   {out or path}")
    return 0


def write_report(
    answer: Answer,
    store: Store,
    path: Path,
    *,
    directions: Mapping[str, str] | None = None,
    confirm_command: str | None = None,
) -> None:
    """Write the report of a study as one HTML file.

    Args:
        answer: The answer of a finished or unfinished study.
        store: Holds the study.
        path: Replaced if it exists.
        directions: Metric of the workload to "minimize" or "maximize", which ReduceLROnPlateau may need; None: what
            the space says.
        confirm_command: The whole command, or call, that confirms this study; None: the command line's.

    Raises:
        OSError: The file cannot be written.
    """
    study, header = answer.study, store.header(answer.study.name)
    options = cli.root_options(store.root, store.url)
    results = StudyResults(
        name=study.name,
        space=study.space,
        trials=study.ended,
        planned=study.planned,
        groups=study.groups,
        val_samples=_val_samples(header.fingerprint),
        with_rates=_with_rates(answer, directions),
        confirmed=_confirmed(answer),
        code=None if answer.trial is None else trial_code(study, answer.trial),
        options=options,
        confirm_command=confirm_command or _confirm_command(study, options),
    )
    shares = importances(study.space, study.ended, epoch=results.first_rung)
    if shares:
        results = dataclasses.replace(results, importance=Importance(shares=shares, epoch=results.first_rung))
    write_atomic(path, build_page(results))


def _val_samples(fingerprint: Mapping[str, str] | None) -> int | None:
    """Return the number of validation samples, which the fingerprint begins with; None if it is not known."""
    count = (fingerprint or {}).get("val", "").partition(" ")[0]
    return int(count) if count.isdecimal() else None


def _confirm_command(study: Study, options: str) -> str:
    """Return the command that confirms a study; it names the user's code again, without which it is refused."""
    choice = study.space.workload
    if isinstance(choice, Own) and choice.function.startswith(IN_PYTHON):
        return f"from Python: confirm({study.name!r}, workload=...)"
    code = ""
    if study.space.own_code():
        code = " --space FILE"
    elif isinstance(choice, Own):
        code = f" --workload {shlex.quote(choice.function)}"
    return f"python -m pipeline.confirm --study {study.name}{code}{options}"


def _with_rates(answer: Answer, directions: Mapping[str, str] | None) -> list[EndedTrial]:
    """Return the winner and the next trials with their learning rates, which no study stores."""
    objective, best = answer.study.space.objective, answer.study.best(DRAWN)
    known = directions or {"train/loss": "minimize", "val/loss": "minimize", objective.metric: objective.direction}
    first = [] if answer.trial is None else [answer.trial]
    made = []
    for trial in [*first, *(trial for trial in best if trial is not answer.trial)][:DRAWN]:
        try:
            epochs = replay_rates(trial.config, trial.epochs, directions=known)
        except LookupError:  # a schedule of the person's own that was not loaded, or a metric of unknown direction
            if trial is answer.trial:
                return []
            continue
        made.append(dataclasses.replace(trial, epochs=epochs))
    return made


def _confirmed(answer: Answer) -> Confirmed:
    """Return the confirmation as plain values."""
    confirmation = answer.confirmation
    measured = [found for found in confirmation.table if found.mean is not None]
    strategies = [
        ConfirmedStrategy(
            label=found.candidate.label,
            config=found.candidate.config,
            trial=found.candidate.trial,
            values=found.values,
            mean=found.mean,
            std=found.std,
            incomplete={seed: run.state.value for seed, run in found.runs.items() if run.value is None},
        )
        for found in confirmation.table
    ]
    differences = [(rival.candidate.label, answer.difference(rival)) for rival in answer.rivals]
    return Confirmed(
        seeds=confirmation.seeds,
        strategies=strategies,
        comparisons=[
            Comparison(
                other=label,
                better_by=difference.mean,
                low=difference.low,
                high=difference.high,
                paired=difference.method == "paired",
            )
            for label, difference in differences
            if difference is not None
        ],
        complete=confirmation.complete,
        test=confirmation.test(),
        residual=residual_deviation([list(found.values.values()) for found in measured]),
        reason=answer.unconfirmed,
    )
