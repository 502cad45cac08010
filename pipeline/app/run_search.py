"""Run a search: from checked options to best.yaml."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.console import Console

from pipeline.app import cli
from pipeline.app.best_yaml import config_file
from pipeline.app.device import environment
from pipeline.app.display import (
    TABLE_WIDTH,
    Progress,
    best_table,
    busy,
    failure_line,
    score_line,
    strategy_line,
    waiting_line,
)
from pipeline.app.options import SearchOptions
from pipeline.app.prepare import fingerprint_of, prepare
from pipeline.app.result import SearchResult
from pipeline.errors import DataError, DeviceError, StorageError, counted, nearest, printable
from pipeline.files.atomic import write_atomic
from pipeline.files.signals import Interrupts
from pipeline.files.strict_yaml import dumps
from pipeline.space.optimizers import optimizer_class
from pipeline.space.own_code import is_own
from pipeline.space.search_space import SearchSpace
from pipeline.space.trial import EpochMetrics
from pipeline.study.checkpoint import Checkpoints
from pipeline.study.loop import forget_ended, run_group
from pipeline.study.store import Store
from pipeline.study.study import Study
from pipeline.tracking.process import TrackerProcess
from pipeline.tracking.tracker import StoredTrial, StudyInfo, StudySummary
from pipeline.training.executor import LocalExecutor
from pipeline.training.optim import replay_rates
from pipeline.training.rows.update_rules import has_rule

SIMILAR = 0.8
"""Likeness of the names of two studies from which one may be the other, mistyped."""


def run_search(options: SearchOptions, tracker: TrackerProcess, console: Console) -> SearchResult:
    """Run or continue a search: prepare the workload, train group after group, write best.yaml.

    Everything that can be refused is refused before the first file or folder is written.
    """
    space, trials = options.space, options.trials
    if options.workload is None:
        cli.say_own_code(space, functools.partial(console.print, soft_wrap=True))
    with busy(console, "reading the data, and trying model, loss and metrics"):
        space, executor = prepare(
            space,
            source=options.source,
            device=options.device,
            searching=True,
            rows=options.rows,
            workload=options.workload,
        )
    store = Store(options.folder, warn=cli.warn)
    with busy(console, "comparing code, data and model with those of the study"):
        trained = fingerprint_of(space, executor)
    compared = None if options.changed_code else trained
    name, exists = store.choose(space, trials=trials, name=options.study, rows=options.rows, fingerprint=compared)
    if not exists and options.study is not None:
        near = nearest(name, [header.name for header in store.headers()], cutoff=SIMILAR)
        if near is not None:
            console.print(f"new study     {name}; did you mean to continue {near}?", soft_wrap=True)
    resume = options.resume(name)
    message = f"ended at once; go on with: {resume}"
    interrupts = Interrupts(options.timeout, exit_message=message, exits=not options.from_python)
    with contextlib.closing(store), store.lock(name), contextlib.closing(executor), interrupts:
        # Another search may have begun the study meanwhile.
        _, exists = store.choose(space, trials=trials, name=name, rows=options.rows, fingerprint=compared)
        if exists:
            study = store.open(name, trials=trials, fingerprint=trained)
            executor.adopt(study.rules)
        else:
            study = store.create(space, name=name, trials=trials, rules=executor.rules, fingerprint=trained)
        with busy(console, "trying whether trials of this model train as rows of one matrix"):
            headline = _headline(study, executor, options)
        console.print(headline, soft_wrap=True)
        if options.timeout is not None:
            limit = f"time limit    {options.timeout:g} minutes; an epoch that trains then is finished first"
            console.print(limit, soft_wrap=True)
        with _tracked(study, executor, tracker, console), _stopped_by_errors(tracker, resume):
            checkpoints = Checkpoints(store.folder(name) / "checkpoints", warn=cli.warn)
            _run(study, trials, executor, checkpoints, tracker, interrupts, console)
            _finish(study, store, tracker, console, options)
            if len(study.ended) < trials:
                console.print(f"{interrupts.reason}; go on with: {resume}", soft_wrap=True)
    ranking = tuple(study.best(len(study.ended)))
    status = 0 if ranking else 1
    if len(study.ended) < trials:
        status = interrupts.exit_status
    if tracker.incomplete:
        status = status or 1
    return SearchResult(
        study=study.name,
        space=study.space,
        trials=tuple(study.ended),
        ranking=ranking,
        config_file=_best_file(study, store) if ranking else None,
        exit_status=status,
    )


def _run(
    study: Study,
    trials: int,
    executor: LocalExecutor,
    checkpoints: Checkpoints,
    tracker: TrackerProcess,
    interrupts: Interrupts,
    console: Console,
) -> None:
    """Train group after group until `trials` trials have ended."""

    def tell_untold(*, wait: bool = False) -> None:
        for trial in (study.ended[number] for number in tracker.untold(wait=wait)):
            epochs = replay_rates(trial.config, trial.epochs, directions=executor.workload.directions)
            tracker.end(dataclasses.replace(trial, epochs=epochs))

    with Progress(study, trials=trials, console=console, interrupts=interrupts) as progress:

        def on_epoch(metrics: Mapping[int, EpochMetrics]) -> None:
            progress.epoch(metrics)
            tracker.epoch(metrics)
            tell_untold()  # once MLflow is open, of earlier trials that it lacks

        while not interrupts.reason and (proposals := study.next_group(trials)):
            configs = {number: config for number, (config, _) in proposals.items()}
            group = executor.build(configs)
            progress.group_begins(executor.describe(configs))
            for trial in run_group(
                group,
                proposals,
                study,
                checkpoints=checkpoints,
                environment=environment(executor),
                on_epoch=on_epoch,
                interrupted=interrupts.asked,
                rules=lambda: executor.rules,
                on_begin=tracker.begin,
                on_end=tracker.end,
            ):
                study.add(trial)
            progress.group_ended()
    tell_untold(wait=True)
    forget_ended(checkpoints, study)


@contextlib.contextmanager
def _tracked(study: Study, executor: LocalExecutor, tracker: TrackerProcess, console: Console) -> Iterator[None]:
    """Have MLflow record a study; a failure of MLflow is a warning, and in the end the exit status."""
    space = study.space
    charted = {name.partition(".")[0]: name for name in space.example().group_names}  # the last of a group's layers
    info = StudyInfo(
        name=study.name,
        identity=study.identity,
        workload=space.workload.title,
        objective=space.objective,
        groups=tuple(charted.values()),
        searched=space.searched_hyperparameters(),
        shared=space.shared_hyperparameters(),
        space=dumps(space.document),
        seed=space.seed,
        started=study.ended[0].started if study.ended else time.time(),
        environment=environment(executor),
        ended=tuple(map(StoredTrial.of, study.ended)),
    )
    tracker.open(info)
    try:
        yield
    finally:
        with waiting_line(console) as waiting:
            warnings = tracker.close(waiting=waiting)
        for warning in warnings:
            cli.warn(warning)
        if tracker.incomplete:
            cli.warn("what is missing is recorded when the search goes on: run the same command again")


@contextlib.contextmanager
def _stopped_by_errors(tracker: TrackerProcess, command: str) -> Iterator[None]:
    """On an error, mark the study in MLflow as stopped, and add the command that continues to the message."""
    try:
        yield
    except Exception as error:
        tracker.finish(StudySummary(finished=False, note=f"Stopped: {error}", ended=time.time()))
        if isinstance(error, StorageError | DataError | DeviceError):
            raise type(error)(f"{error}\nonce that is mended, go on with: {command}") from error
        raise


def _finish(study: Study, store: Store, tracker: TrackerProcess, console: Console, options: SearchOptions) -> None:
    """Write best.yaml, finish MLflow's record, and print the best trials and where to find them."""
    best = study.best()
    path = _best_file(study, store)
    if not best:
        count = len(study.ended)
        those = "the one that has ended" if count == 1 else f"each of the {count} that have ended"
        ended = f"{those} was pruned, diverged or failed"
        console.print(f"no trial is complete: {ended if study.ended else 'none has ended yet'}", soft_wrap=True)
        for trial in study.ended[-3:]:
            console.print(f"  trial {trial.number} {trial.state}: {trial.reason}", soft_wrap=True)
        note = "No trial is complete."
    else:
        console.print()
        console.width = max(console.width, TABLE_WIDTH)
        console.print(best_table(study.best(len(study.ended)), study.space), crop=False)
        console.print()
        objective = study.space.objective
        note = f"Best of {counted(len(study.ended), 'trial')}: #{best[0].number}, {objective.metric} "
        note += f"{score_line(best[0], objective)}, {strategy_line(best[0].config, study.space)}. "
        note += f"Train it again: `{options.train_again(Path('best.yaml'))}`."
        if other := _optunas_best(study):
            line = (
                f"Optuna's best trial is #{other}, which has the same value: Optuna takes the first, this search the "
            )
            line += "lowest validation loss"
            console.print(line, soft_wrap=True)
            note += f" {line}."
    if failure := failure_line(study.ended):
        console.print(failure, soft_wrap=True)
    if best:
        try:
            write_atomic(path, config_file(study, best[0]))
        except OSError as error:
            raise StorageError(f"{path}: cannot be written: {error.strerror}; see python -m pipeline.export") from None
        shown = options.root / path.relative_to(options.folder)
        console.print(f"best config   {shown}   train it again: {options.train_again(shown)}", soft_wrap=True)
    winner, files = (best[0], (path,)) if best else (None, ())
    finished = len(study.ended) >= options.trials
    tracker.finish(StudySummary(finished=finished, note=note, best=winner, ended=time.time(), files=files))
    if best:
        for link in tracker.links():
            console.print(f"compare       {link}", soft_wrap=True)


def _optunas_best(study: Study) -> int | None:
    """Return the number of Optuna's best trial, the first of equal value, if the winner is another."""
    (best, *_) = study.best()
    first = min(trial.number for trial in study.best(len(study.ended)) if trial.value == best.value)
    return first if first != best.number else None


def _headline(study: Study, executor: LocalExecutor, options: SearchOptions) -> str:
    space, trials, size = study.space, options.trials, min(study.group_size, options.trials)
    together = f"{size} trials at once" if size > 1 else "one trial at a time"
    together += _which_alone(space, executor)
    name = printable(executor.workload.name)
    what = f"{name} · {counted(space.epochs, 'epoch')} · {executor.device}, {together}"
    resumed = f", goes on from trial {len(study.ended)}" if study.ended else ""
    if len(study.ended) >= trials:
        those = "its one trial has" if len(study.ended) == 1 else f"all of its {len(study.ended)} trials have"
        resumed = f": {those} ended; ask for more with {'trials=' if options.from_python else '--trials'}"
    return f"{what}   study {study.name}, seed {space.seed}{resumed}"


def _which_alone(space: SearchSpace, executor: LocalExecutor) -> str:
    """Return in words which trials train plain, and why."""
    config = space.example()
    sized = [dataclasses.replace(config, batch_size=size) for size in space.batch_sizes]
    plain = {str(c.batch_size): why for c in sized if (why := executor.plain_with_any_optimizer(c)) is not None}
    why = next(iter(plain.values()), "")
    if len(plain) == len(sized):
        return f", each alone, since {why}"
    words = f", those of batch_size {' and '.join(plain)} each alone, since {why}" if plain else ""
    alone = [name for name in space.optimizers if not has_rule(optimizer_class(name))]
    alone += filter(is_own, space.schedulers)
    return words + (f", those of {' and '.join(alone)} each alone" if alone else "")


def _best_file(study: Study, store: Store) -> Path:
    return store.folder(study.name) / "best.yaml"
