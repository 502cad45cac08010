"""Run a search: from checked options to best.yaml."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console

from pipeline.app import cli
from pipeline.app.answer import Answer
from pipeline.app.display import busy, say, waiting_line
from pipeline.app.finish import best_file, finish
from pipeline.app.options import SearchOptions
from pipeline.app.prepare import fingerprint_of, prepare
from pipeline.app.progress import Progress
from pipeline.app.result import SearchResult
from pipeline.app.run_confirmation import announcement, run_confirmation
from pipeline.app.run_trials import Worker, run_trials
from pipeline.app.warm_start import refuse_unknown, warm_started
from pipeline.app.workers import gpus_of, workers_of
from pipeline.errors import DataError, DeviceError, StorageError, counted, nearest, printable
from pipeline.files.signals import Interrupts
from pipeline.files.strict_yaml import dumps
from pipeline.space.optimizers import optimizer_class
from pipeline.space.own_code import is_own
from pipeline.space.search_space import SearchSpace
from pipeline.space.trial import EndedTrial
from pipeline.study.candidates import plan
from pipeline.study.checkpoint import Checkpoints
from pipeline.study.confirmation import Confirmation
from pipeline.study.models import Models
from pipeline.study.store import Store
from pipeline.study.study import Study
from pipeline.tracking.process import TrackerProcess
from pipeline.tracking.tracker import StoredTrial, StudyInfo, StudySummary
from pipeline.training.executor import LocalExecutor
from pipeline.training.optim import replay_rates
from pipeline.training.rows.update_rules import has_rule

OPENING = "opening the study"
SIMILAR = 0.8
"""Likeness of the names of two studies from which one may be the other, mistyped."""


def run_search(options: SearchOptions, store: Store, tracker: TrackerProcess, console: Console) -> SearchResult:
    """Run or continue a search: prepare the workload, train group after group, write best.yaml.

    Everything that can be refused is refused before the first file or folder is written.
    """
    space = options.space
    if options.workload is None:
        cli.say_own_code(space, functools.partial(console.print, soft_wrap=True))
    refuse_unknown(space.warm_start, store, source=options.source)
    with busy(console, "reading the data, and trying model, loss and metrics"):
        space, executor = prepare(
            space,
            source=options.source,
            device=options.device,
            searching=True,
            rows=options.rows,
            workload=options.workload,
        )
    with busy(console, "comparing code, data and model with those of the study"):
        trained = fingerprint_of(space, executor)
    with busy(console, OPENING):
        name, exists = _chosen(store, space, trained, options)
    if not exists and options.study is not None:
        near = nearest(name, [header.name for header in store.headers()], cutoff=SIMILAR)
        if near is not None:
            say(console, f"new study     {name}; did you mean to continue {near}?")
    if not exists:
        space = warm_started(space, store, source=options.source, say=functools.partial(say, console))
    with contextlib.ExitStack() as stack:
        with busy(console, "starting workers" if options.workers or options.ray else OPENING):
            workers = stack.enter_context(workers_of(options, executor))
        return _searched(options, space, trained, executor, workers, store, tracker, console, name=name)


def _searched(
    options: SearchOptions,
    space: SearchSpace,
    trained: Mapping[str, str] | None,
    executor: LocalExecutor,
    workers: Sequence[Worker],
    store: Store,
    tracker: TrackerProcess,
    console: Console,
    *,
    name: str,
) -> SearchResult:
    """Train what the study of this name lacks, with these workers."""
    trials, resume = options.trials, options.resume(name)
    message = f"ended at once; go on with: {resume}"
    interrupts = Interrupts(options.timeout, exit_message=message, exits=not options.from_python)
    store.stop_waiting_when(interrupts.asked)
    with store.lock(name), interrupts:
        with busy(console, OPENING):
            study = _opened(store, space, trained, workers, dataclasses.replace(options, study=name))
        with busy(console, "trying how many trials of this model train at once"):
            headline = _headline(study, executor, workers, options)
        say(console, *headline)
        if options.storage is not None:
            say(console, f"record        {options.storage}")
        if options.timeout is not None:
            limit = f"time limit    {options.timeout:g} minutes; an epoch that trains then is finished first"
            say(console, limit)
        if (
            len(study.ended) < trials
            and not options.confirming
            and (said := announcement(options.confirm, space, trials=trials))
        ):
            say(console, said)
        before = {trial.number: trial for trial in [*study.ended, *Answer.of(study).confirmation.runs]}
        with _tracked(study, before, workers[0], tracker, console), _stopped_by_errors(tracker, interrupts, resume):
            done = _train(study, before, executor, workers, store, tracker, interrupts, console, options)
            answer = Answer.of(study)
            finish(answer, store, tracker, console, options, done=done)
            if not done:
                console.print(f"{interrupts.reason}; go on with: {resume}", soft_wrap=True)
        if done and not tracker.incomplete:
            study.finish(confirmed=options.confirm.share > 0)
    status = 0 if answer.trial else 1
    if not done:
        status = interrupts.exit_status
    if tracker.incomplete:
        status = status or 1
    return SearchResult(
        study=study.name,
        space=study.space,
        trials=tuple(study.ended),
        ranking=tuple(study.best(len(study.ended))),
        best=answer.trial,
        confirmed=tuple(answer.confirmation.table) if answer.confirmation.complete else (),
        config_file=best_file(store, study.name) if answer.trial else None,
        exit_status=status,
    )


def _chosen(
    store: Store, space: SearchSpace, trained: Mapping[str, str] | None, options: SearchOptions
) -> tuple[str, bool]:
    """Return the name of the study that the options mean, and whether it exists."""
    return store.choose(
        space,
        trials=options.trials,
        name=options.study,
        rows=options.rows,
        fingerprint=None if options.changed_code else trained,
        confirm=options.confirm.share > 0,
    )


def _opened(
    store: Store,
    space: SearchSpace,
    trained: Mapping[str, str] | None,
    workers: Sequence[Worker],
    options: SearchOptions,
) -> Study:
    """Open the study, or begin it; another search may have begun it since it was chosen."""
    name, exists = _chosen(store, space, trained, options)
    if not exists:
        space = warm_started(space, store, source=options.source)  # a study that was chosen may be deleted by now
        rules = workers[0].executor.rules
        return store.create(space, name=name, trials=options.trials, rules=rules, fingerprint=trained)
    study = store.open(name, trials=options.trials, fingerprint=trained)
    rules = study.rules
    if len(workers) > 1:  # each decides by its own memory, as on another kind of device, and keeps `--rows`
        rules = dataclasses.replace(rules, device="")
    for worker in workers:
        worker.executor.adopt(rules)
    return study


def _train(
    study: Study,
    before: Mapping[int, EndedTrial],
    executor: LocalExecutor,
    workers: Sequence[Worker],
    store: Store,
    tracker: TrackerProcess,
    interrupts: Interrupts,
    console: Console,
    options: SearchOptions,
) -> bool:
    """Train the trials that a study lacks, then its confirmation; return whether nothing is left to train."""
    folder = store.folder(study.name)
    checkpoints = Checkpoints(folder / "checkpoints", warn=cli.warn)
    if not options.confirming:
        models = Models(folder / "models", study, warn=cli.warn)
        with Progress(study, trials=options.trials, console=console, interrupts=interrupts) as progress:
            run_trials(
                study,
                options.trials,
                workers,
                checkpoints=checkpoints,
                models=models,
                told=(progress, tracker),
                group_ended=progress.group_ended,
                interrupted=interrupts.asked,
                after_epoch=functools.partial(_tell_untold, before, executor, tracker),
            )
    done = options.confirming or len(study.ended) >= options.trials
    if done:
        confirmation = Confirmation(study, plan(study, options.confirm))
        runs = Checkpoints(checkpoints.folder / "confirmation", warn=cli.warn)
        run_confirmation(confirmation, executor, workers, runs, tracker, interrupts, console)
        done = confirmation.complete or not confirmation.candidates
        if confirmation.complete:
            confirmation.keep()
    with busy(console, "asking MLflow which trials it lacks"):
        _tell_untold(before, executor, tracker, wait=True)
    return done


def _tell_untold(
    before: Mapping[int, EndedTrial], executor: LocalExecutor, tracker: TrackerProcess, *, wait: bool = False
) -> None:
    """Tell MLflow of the trials that ended before and that it lacks, once it has said which, or after waiting."""
    for number in tracker.untold(wait=wait):
        trial = before[number]
        epochs = replay_rates(trial.config, trial.epochs, directions=executor.workload.directions)
        tracker.end(dataclasses.replace(trial, epochs=epochs))


@contextlib.contextmanager
def _tracked(
    study: Study,
    before: Mapping[int, EndedTrial],
    worker: Worker,
    tracker: TrackerProcess,
    console: Console,
) -> Iterator[None]:
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
        environment=worker.environment(),
        ended=tuple(map(StoredTrial.of, before.values())),
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
def _stopped_by_errors(tracker: TrackerProcess, interrupts: Interrupts, command: str) -> Iterator[None]:
    """On an error, mark the study in MLflow as stopped, and add the command that continues to the message."""
    try:
        yield
    except Exception as error:
        tracker.finish(StudySummary(finished=False, note=f"Stopped: {error}", ended=time.time()))
        if isinstance(error, StorageError | DataError | DeviceError):
            stopped = type(error)(f"{error}\nonce that is mended, go on with: {command}")
            stopped.exit_status = interrupts.exit_status or stopped.exit_status
            raise stopped from error
        raise


def _headline(
    study: Study, executor: LocalExecutor, workers: Sequence[Worker], options: SearchOptions
) -> tuple[str, str]:
    space, trials = study.space, options.trials
    asked = options.workers is not None or options.ray is not None
    where = where_trained(
        str(workers[0].environment()["device"]) if asked else str(executor.device),
        workers=len(workers) if asked else None,
        gpus=gpus_of(options),
        group=min(study.group_size, trials),
    ) + _which_alone(space, executor)
    name = printable(executor.workload.name)
    what = f"{name} · {counted(space.epochs, 'epoch')} · {where}"
    resumed = f", goes on from trial {len(study.ended)}" if study.ended else ""
    if options.confirming:
        resumed = ""
    elif len(study.ended) >= trials and _is_unconfirmed(study, options):
        resumed = ", goes on with its confirmation"
    elif len(study.ended) >= trials:
        those = "its one trial has" if len(study.ended) == 1 else f"all of its {len(study.ended)} trials have"
        resumed = f": {those} ended; ask for more with {'trials=' if options.from_python else '--trials'}"
    return what, f"study {study.name}, seed {space.seed}{resumed}"


def where_trained(device: str, *, workers: int | None, gpus: int, group: int) -> str:
    """Return in words where and how many at a time trials train, and whether GPUs are left unused.

    Args:
        device: Name or kind of the device.
        workers: Number of Ray's workers; None: this process trains.
        gpus: Number of GPUs that the search may use.
        group: Trials in a group.
    """
    together = f"{group} trials at once" if group > 1 else "one trial at a time"
    if workers is not None:
        together = f"at most {together} each" if workers > 1 and group > 1 else together
        return f"{counted(workers, f'worker on {device}', f'workers on {device}')}, {together}"
    unused = f" (1 of {gpus} GPUs used; --workers {gpus})" if gpus > 1 else ""
    return f"{device}{unused}, {together}"


def _is_unconfirmed(study: Study, options: SearchOptions) -> bool:
    """Return whether the confirmation of a study has runs left."""
    return Confirmation(study, plan(study, options.confirm)).epochs_left > 0


def _which_alone(space: SearchSpace, executor: LocalExecutor) -> str:
    """Return in words which trials train plain, and why."""
    config = space.example()
    sized = [dataclasses.replace(config, batch_size=size) for size in space.batch_sizes]
    plain = {str(c.batch_size): why for c in sized if (why := executor.plain_with_any_optimizer(c)) is not None}
    why = next(iter(plain.values()), "")
    if len(plain) == len(sized):
        return f", each alone, since {why}"
    words = f", those of batch_size {' and '.join(plain)} each alone, since {why}" if plain else ""
    if executor.eager_because is not None:
        words += f", operation by operation, since {executor.eager_because}"
    alone = [name for name in space.optimizers if not has_rule(optimizer_class(name))]
    alone += filter(is_own, space.schedulers)
    return words + (f", those of {' and '.join(alone)} each alone" if alone else "")
