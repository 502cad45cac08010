"""Run a search from its options to best.yaml."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pipeline.app import cli
from pipeline.app.options import (
    Options,
    checked_options,
    command,
    read_space,
    source,
    with_workload,
)
from pipeline.errors import DataError, DeviceError, StorageError
from pipeline.space.overrides import Overrides

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.files.signals import Interrupts
    from pipeline.space.search_space import SearchSpace
    from pipeline.space.trial import EndedTrial
    from pipeline.study.checkpoint import Checkpoints
    from pipeline.study.store import Store
    from pipeline.study.study import Study
    from pipeline.tracking.process import TrackerProcess
    from pipeline.training.executor import Trainer
    from pipeline.workloads.workload import Workload


TABLE_WIDTH = 200
"""Most characters in a line of the table of the best: a narrow terminal breaks its lines rather than lose numbers."""


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search has come to."""

    study: str
    trials: tuple[EndedTrial, ...]
    """All that have ended, by number."""
    best: EndedTrial | None
    """The best of those that are complete."""
    config_file: Path | None
    """The best one's config, `best.yaml`."""
    exit_status: int
    """As the command line's: 0 if every trial has ended and one is complete."""


def search(
    space: Path | str | Mapping[str, Any] | None = None,
    *,
    workload: Callable[[], Workload] | Workload | str | None = None,
    overrides: Overrides = MappingProxyType({}),
    trials: int | None = None,
    timeout: float | None = None,
    study: str | None = None,
    root: Path | str = ".",
    device: str = "auto",
    rows: int | None = None,
    quiet: bool = False,
) -> SearchResult:
    """Run or go on with a search, as the command line does.

    Args:
        space: A search-space file, the name of a ready-made one, or what one says; None: a ready-made one.
        workload: In place of the space's: a workload, a function that returns one, or a name as `--workload` takes.
        overrides: Changes to the space, dotted place to value, such as `{"optimizer.sgd.base_lr.high": 0.5}`.
        trials: In total; None: what the study was last asked for, or 50.
        timeout: In minutes.
        study: Name of the study to go on with or to begin.
        root: Folder that holds `mlflow.db` and `mlruns/`.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        rows: At most this many trials in a matrix; None: as many as train fastest.
        quiet: Print nothing.

    Raises:
        PipelineError: As `pipeline.errors` draws them; `InvalidInput` with every problem of what was given.
    """
    from rich.console import Console

    options = checked_options(
        space=space, trials=trials, timeout=timeout, study=study, root=root, device=device, rows=rows
    )
    return run_search(with_workload(options, workload, overrides), Console(highlight=False, markup=False, quiet=quiet))


def run_search(options: Options, console: Console) -> SearchResult:
    """Run or go on with a search, from its file to best.yaml."""
    space, trials = read_space(options)
    cli.refuse_unwritable(options.root / "mlruns" / "optuna.db", "--root")

    from pipeline.tracking.process import TrackerProcess

    with contextlib.closing(TrackerProcess(options.root)) as tracker:  # imports MLflow while this process imports torch
        return _search_space(space, trials, options, tracker, console)


def _search_space(
    space: SearchSpace, trials: int, options: Options, tracker: TrackerProcess, console: Console
) -> SearchResult:
    """Run or go on with the search of a space."""
    loading = console.status("loading PyTorch and Optuna") if console.is_terminal else contextlib.nullcontext()
    with loading:
        from pipeline.app.prepare import prepare
        from pipeline.files.signals import Interrupts
        from pipeline.study.checkpoint import Checkpoints
        from pipeline.study.store import Store

    cli.say_own_code(space, functools.partial(console.print, soft_wrap=True))
    trainer = prepare(
        space,
        source=source(options),
        device=options.device,
        searching=True,
        rows=options.rows,
        workload=options.workload,
    )
    store = Store(options.root)
    name, _ = store.choose(space, trials=trials, name=options.study)
    way_on = command(options, space, study=name, trials=trials)
    interrupts = Interrupts(options.timeout, exit_message=f"ended at once; go on with: {way_on}")
    with contextlib.closing(store), store.lock(name), contextlib.closing(trainer), interrupts:
        _, exists = store.choose(space, trials=trials, name=name)  # another search may have begun it meanwhile
        study = store.open(name, trials=trials) if exists else store.create(space, name=name, trials=trials)
        console.print(_headline(study, trainer, trials), soft_wrap=True)
        with _tracked(study, tracker), _stopped_by_errors(tracker, way_on):
            checkpoints = Checkpoints(store.folder(name) / "checkpoints", warn=cli.warn)
            _run(study, trials, trainer, checkpoints, tracker, interrupts, console)
            _finish(study, store, tracker, console, finished=len(study.ended) >= trials)
            if len(study.ended) < trials:
                console.print(f"{interrupts.reason}; go on with: {way_on}", soft_wrap=True)
    best = next(iter(study.best()), None)
    status = 0 if best else 1
    if len(study.ended) < trials:
        status = interrupts.exit_status
    return SearchResult(
        study=study.name,
        trials=tuple(study.ended),
        best=best,
        config_file=_best_file(study, store) if best else None,
        exit_status=status,
    )


def _run(
    study: Study,
    trials: int,
    trainer: Trainer,
    checkpoints: Checkpoints,
    tracker: TrackerProcess,
    interrupts: Interrupts,
    console: Console,
) -> None:
    """Train group after group until `trials` have ended."""
    from pipeline.app.display import Progress
    from pipeline.app.prepare import environment
    from pipeline.study.loop import forget_ended, run_group
    from pipeline.training.optim import replay_rates

    for trial in study.ended:  # MLflow passes over those that it has, which after a crash need not be all
        epochs = replay_rates(trial.config, trial.epochs, directions=trainer.workload.directions)
        tracker.end(dataclasses.replace(trial, epochs=epochs))
    with Progress(study, trials=trials, console=console, interrupts=interrupts) as progress:
        while not interrupts.reason and (proposals := study.next_group(trials)):
            group = trainer.build({number: config for number, (config, _) in proposals.items()})
            progress.group_begins(group.describe())
            for trial in run_group(
                group,
                proposals,
                study,
                checkpoints=checkpoints,
                environment=functools.partial(environment, trainer),
                on_epoch=progress.epoch,
                interrupted=interrupts.asked,
            ):
                study.add(trial)
                tracker.end(trial)
            progress.group_ended()
    forget_ended(checkpoints, study)


@contextlib.contextmanager
def _tracked(study: Study, tracker: TrackerProcess) -> Iterator[None]:
    """Tell the trackers of a study; whatever fails there is a warning."""
    from pipeline.files.strict_yaml import dumps
    from pipeline.tracking.tracker import StudyInfo

    space = study.space
    info = StudyInfo(
        name=study.name,
        identity=study.identity,
        workload=space.workload.title,
        metric=space.objective.metric,
        direction=space.objective.direction,
        groups=tuple(space.param_groups),
        searched=space.searched_hyperparameters(),
        shared=space.shared_hyperparameters(),
        space=dumps(space.document),
        seed=space.seed,
    )
    tracker.open(info)
    try:
        yield
    finally:
        for warning in tracker.close():
            cli.warn(warning)


@contextlib.contextmanager
def _stopped_by_errors(tracker: TrackerProcess, command: str) -> Iterator[None]:
    """Record that an error stopped the search, and say with the error how to go on."""
    from pipeline.tracking.tracker import StudySummary

    try:
        yield
    except Exception as error:
        tracker.finish(StudySummary(finished=False, note=f"Stopped: {error}"))
        if isinstance(error, StorageError | DataError | DeviceError):
            raise type(error)(f"{error}\nonce that is mended, go on with: {command}") from error
        raise


def _finish(study: Study, store: Store, tracker: TrackerProcess, console: Console, *, finished: bool) -> None:
    """Write best.yaml, tell the trackers the summary, and say what was found and where."""
    from pipeline.app.best_yaml import config_file
    from pipeline.app.display import best_table, strategy_line
    from pipeline.files.atomic import write_atomic
    from pipeline.tracking.tracker import StudySummary

    best = study.best()
    path = _best_file(study, store)
    if not best:
        ended = f"each of the {len(study.ended)} that have ended was pruned, diverged or failed"
        console.print(f"no trial is complete: {ended if study.ended else 'none has ended yet'}", soft_wrap=True)
        for trial in study.ended[-3:]:
            console.print(f"  trial {trial.number} {trial.state}: {trial.reason}", soft_wrap=True)
        note = "No trial is complete."
    else:
        console.print()
        console.width = max(console.width, TABLE_WIDTH)
        console.print(best_table(study), crop=False)
        console.print()
        note = f"Best of {len(study.ended)} trials: #{best[0].number}, {study.space.objective.metric} "
        note += f"{best[0].score}, {strategy_line(best[0].config)}. "
        note += "Train it again: `python -m pipeline.train best.yaml`."
        try:
            write_atomic(path, config_file(study, best[0]))
        except OSError as error:
            raise StorageError(f"{path}: cannot be written: {error.strerror}; see python -m pipeline.export") from None
        train = f"train it again: python -m pipeline.train {cli.quoted(path)}"
        console.print(f"best config   {path}   {train}", soft_wrap=True)
    winner, files = (best[0], (path.absolute(),)) if best else (None, ())
    tracker.finish(StudySummary(finished=finished, note=note, best=winner, files=files))
    if best:
        for link in tracker.links():
            console.print(f"compare       {link}", soft_wrap=True)


def _headline(study: Study, trainer: Trainer, trials: int) -> str:
    from pipeline.training.rows.trainer import has_rule

    space, size = study.space, min(study.group_size, trials)
    together = f"{size} trials at once" if size > 1 else "one trial at a time"
    if trainer.plain_because is not None:
        together += f", each alone, since {trainer.plain_because}"
    elif alone := [name for name in space.optimizers if not has_rule(name)]:
        together += f", those of {' and '.join(alone)} each alone"
    what = f"{trainer.workload.name} · {space.epochs} epochs · {trainer.device}, {together}"
    went_on = f", goes on from trial {len(study.ended)}" if study.ended else ""
    if len(study.ended) >= trials:
        went_on = f": all of its {len(study.ended)} trials have ended; ask for more with --trials"
    return f"{what}   study {study.name}, seed {space.seed}{went_on}"


def _best_file(study: Study, store: Store) -> Path:
    return store.folder(study.name) / "best.yaml"
