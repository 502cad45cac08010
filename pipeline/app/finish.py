"""What a search leaves when it ends: the answer on the terminal, best.yaml, and the summary in MLflow."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from pipeline.app.answer import Answer
from pipeline.app.best_yaml import config_file
from pipeline.app.display import TABLE_WIDTH, best_table, confirmation_table, failure_line
from pipeline.app.options import SearchOptions
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
    lines = _print_tables(answer, console) if winner else _nothing_complete(answer)
    if failure := failure_line(study.ended):
        lines.append(failure)
    for line in lines:
        console.print(line, soft_wrap=True)
    files: list[Path] = []
    if winner:
        files.append(path := best_file(store, study.name))
        try:
            write_atomic(path, config_file(study, winner))
        except OSError as error:
            raise StorageError(f"{path}: cannot be written: {error.strerror}; see python -m pipeline.export") from None
        shown = options.root / path.relative_to(options.folder)
        console.print(f"best config   {shown}   train it again: {options.train_again(shown)}", soft_wrap=True)
        if (model := model_file(store.folder(study.name) / "models", winner.number)).exists():
            files.append(model)
            shown = options.root / model.relative_to(options.folder)
            console.print(f"best model    {shown}", soft_wrap=True)
    again = f"Train it again: `{options.train_again(Path('best.yaml'))}`." if winner else ""
    note = f"{counted(len(study.ended), 'trial')}. {'. '.join(line.strip() for line in lines)}. {again}"
    means = {
        confirmed.candidate.trial: confirmed.mean
        for confirmed in answer.confirmation.table
        if confirmed.candidate.trial is not None and confirmed.mean is not None
    }
    summary = StudySummary(
        finished=done, note=note, best=winner, confirmed=means, ended=time.time(), files=tuple(files)
    )
    tracker.finish(summary)
    if winner:
        for link in tracker.links():
            console.print(f"compare       {link}", soft_wrap=True)


def best_file(store: Store, study: str) -> Path:
    """Return the path of a study's best.yaml."""
    return store.folder(study) / "best.yaml"


def _print_tables(answer: Answer, console: Console) -> list[str]:
    """Print the best trials, and the candidates of a complete confirmation; return the lines that say who wins."""
    study = answer.study
    console.print()
    console.width = max(console.width, TABLE_WIDTH)
    console.print(best_table(study.best(len(study.ended)), study.space), crop=False)
    console.print()
    if answer.confirmation.complete:
        console.print(confirmation_table(answer.confirmation.table, study.space), crop=False)
        console.print()
    return answer.lines()


def _nothing_complete(answer: Answer) -> list[str]:
    ended = answer.study.ended
    those = "the one that has ended" if len(ended) == 1 else f"each of the {len(ended)} that have ended"
    outcome = f"{those} was pruned, diverged or failed" if ended else "none has ended yet"
    trials = [f"  trial {trial.number} {trial.state}: {trial.reason}" for trial in ended[-3:]]
    return [f"no trial is complete: {outcome}", *trials]
