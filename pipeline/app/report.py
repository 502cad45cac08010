"""Write the report of a study: gather what the page needs, and write the page."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path

from pipeline.app import cli
from pipeline.errors import InvalidInput, Problem
from pipeline.files.atomic import write_atomic
from pipeline.page.confirmed import Confirmed
from pipeline.page.page import build_page
from pipeline.page.results import Importance, StudyResults
from pipeline.space.trial import EpochMetrics
from pipeline.study.importance import importances
from pipeline.study.store import Store
from pipeline.study.study import Study
from pipeline.training.optim import replay_rates

DRAWN = 5
"""Trials whose learning rates are drawn."""
REPORT = "report.html"


def report(root: Path, *, study: str | None, out: Path | None) -> int:
    """Write the report of a stored study, by default into the study's folder; return the exit status.

    Raises:
        InvalidInput: There is no such study, or the file cannot be written.
    """
    file = None if out is None else cli.writable_out(out)
    with contextlib.closing(Store(root, warn=cli.warn)) as store:
        opened = store.open(study)
        path = store.folder(opened.name) / REPORT if file is None else file
        if file is None:
            cli.refuse_unwritable(path, "--root")
        try:
            write_report(store, opened, path)
        except OSError as error:
            raise InvalidInput("--out", [Problem(str(path), f"cannot be written: {error.strerror}")]) from None
    print(f"report   {out or path}")
    return 0


def write_report(
    store: Store,
    study: Study,
    path: Path,
    *,
    directions: Mapping[str, str] | None = None,
    confirmed: Confirmed | None = None,
    code: str | None = None,
) -> None:
    """Write the report of a study as one HTML file.

    Args:
        store: The store of the study.
        study: A finished or unfinished study.
        path: Replaced if it exists.
        directions: Metric of the workload to "minimize" or "maximize", which ReduceLROnPlateau may need; None: what
            the space says.
        confirmed: What training the finalists again has shown; None if they were not.
        code: The winner as code for a script of the reader's own.

    Raises:
        OSError: The file cannot be written.
    """
    header = store.header(study.name)
    results = StudyResults(
        name=study.name,
        space=study.space,
        trials=study.ended,
        planned=header.trials,
        groups=study.groups,
        val_samples=_val_samples(header.fingerprint),
        rates=_rates(study, directions),
        confirmed=confirmed,
        code=code,
        options="" if store.root == Path() else f" --root {cli.quoted(store.root)}",
    )
    shares = importances(study.space, study.ended, epoch=results.first_rung)
    if shares:
        results = dataclasses.replace(results, importance=Importance(shares=shares, epoch=results.first_rung))
    write_atomic(path, build_page(results))


def _val_samples(fingerprint: Mapping[str, str] | None) -> int | None:
    """Return the number of validation samples, which the fingerprint begins with; None if it is not known."""
    count = (fingerprint or {}).get("val", "").partition(" ")[0]
    return int(count) if count.isdecimal() else None


def _rates(study: Study, directions: Mapping[str, str] | None) -> dict[int, tuple[EpochMetrics, ...]]:
    """Return the epochs of the best trials with their learning rates, which no study stores."""
    objective = study.space.objective
    known = directions or {"train/loss": "minimize", "val/loss": "minimize", objective.metric: objective.direction}
    rates = {}
    for trial in study.best(DRAWN):
        with contextlib.suppress(LookupError):  # a schedule of the person's own that was not loaded, or its metric
            rates[trial.number] = replay_rates(trial.config, trial.epochs, directions=known)
    return rates
