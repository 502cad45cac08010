"""What a search leaves when it ends: the answer on the terminal, best.yaml, and the summary in MLflow."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from pipeline.app import cli
from pipeline.app.answer import Answer
from pipeline.app.best_yaml import config_file
from pipeline.app.display import busy, failure_line, print_best, print_confirmation, say
from pipeline.app.options import SearchOptions
from pipeline.app.report import REPORT, write_report
from pipeline.errors import StorageError, counted
from pipeline.files.atomic import write_atomic
from pipeline.study.models import model_file
from pipeline.study.store import Store
from pipeline.tracking.process import TrackerProcess
from pipeline.tracking.tracker import StudySummary


def finish(
    answer: Answer, store: Store, tracker: TrackerProcess, console: Console, options: SearchOptions, *, done: bool
) -> None:
    """Print the best trials, how they were confirmed and where to find them; write best.yaml; finish MLflow's record.

    Args:
        answer: The answer of the study.
        store: Holds the study.
        tracker: Is told of the summary.
        console: Where to print.
        options: The options of the search.
        done: Whether nothing is left to do.
    """
    study, winner = answer.study, answer.trial
    if winner:
        _print_tables(answer, console)
    lines = answer.lines(confirm=options.confirm_again(study.name)) if winner else _nothing_complete(answer)
    if failure := failure_line(study.ended):
        lines.append(failure)
    for line in lines:
        say(console, line, command=line.startswith("confirm it"))
    files = list(_written(answer, store, console, options)) if winner else []
    again = f"Train it again: `{options.train_again(Path('best.yaml'))}`." if winner else ""
    note = f"{counted(len(study.ended), 'trial')}. {'. '.join(' '.join(line.split()) for line in lines)}. {again}"
    means = {
        confirmed.candidate.trial: confirmed.mean
        for confirmed in answer.confirmation.table
        if answer.confirmation.winner and confirmed.candidate.trial is not None and confirmed.mean is not None
    }
    summary = StudySummary(
        finished=done, note=note, best=winner, confirmed=means, ended=time.time(), files=tuple(files)
    )
    tracker.finish(summary)
    if winner:
        with busy(console, "MLflow opens"):
            links = tracker.links()
        for link in links:
            say(console, "compare    ", *link.split("   "), command=True)


def _written(answer: Answer, store: Store, console: Console, options: SearchOptions) -> Iterator[Path]:
    """Write and name the files of the answer: best.yaml, the winner's model, which is there already, the report.

    Raises:
        StorageError: best.yaml cannot be written.
    """
    study, winner = answer.study, answer.trial
    assert winner is not None

    def shown(path: Path) -> Path:
        return options.root / path.relative_to(options.folder)

    path = best_file(store, study.name)
    try:
        write_atomic(path, config_file(study, winner))
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror}; see python -m pipeline.export") from None
    say(console, "best config", str(shown(path)), f"train it again: {options.train_again(shown(path))}", command=True)
    yield path
    if (model := model_file(store.folder(study.name) / "models", winner.number)).exists():
        say(console, "best model ", str(shown(model)), command=True)
        yield model
    report = store.folder(study.name) / REPORT
    try:
        with busy(console, "writing the report"):
            write_report(answer, store, report, confirm_command=options.confirm_again(study.name))
    except Exception as error:  # a search of hours does not end with an error for the sake of a picture
        cli.warn(f"the report could not be written: {type(error).__name__}: {error}")
        return
    say(console, "report     ", str(shown(report)), command=True)
    yield report


def best_file(store: Store, study: str) -> Path:
    """Return the path of a study's best.yaml."""
    return store.folder(study) / "best.yaml"


def _print_tables(answer: Answer, console: Console) -> None:
    """Print the best trials, and the candidates of a complete confirmation."""
    study = answer.study
    console.print()
    print_best(console, study.best(len(study.ended)), study.space)
    console.print()
    if answer.confirmation.complete:
        print_confirmation(console, answer.confirmation.table, study.space)
        console.print()


def _nothing_complete(answer: Answer) -> list[str]:
    ended = answer.study.ended
    those = "the one that has ended" if len(ended) == 1 else f"each of the {len(ended)} that have ended"
    outcome = f"{those} was pruned, diverged or failed" if ended else "none has ended yet"
    trials = [f"  trial {trial.number} {trial.state}: {trial.reason}" for trial in ended[-3:]]
    return [f"no trial is complete: {outcome}", *trials]
