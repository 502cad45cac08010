"""Search learning-rate strategies: `python -m pipeline.search --trials 50`.

`search` reads a search space, asks the study for trials, turns each into a TrialConfig, splits the model into
parameter groups, builds optimizers and schedulers, trains epochs, reports metrics to the study and to MLflow, and
exports best.yaml.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import cli
from pipeline.errors import StorageError

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.background import BackgroundTracker
    from pipeline.checkpoint import Checkpoints
    from pipeline.interrupts import Interrupts
    from pipeline.space import SearchSpace
    from pipeline.store import Store
    from pipeline.study import Study
    from pipeline.trainers import Trainer

DEFAULT_SPACE = Path(__file__).resolve().parent.parent / "search_spaces" / "default.yaml"
DEFAULT_TRIALS = 50


@dataclass(frozen=True)
class Options:
    """What the command line says, read but not yet checked against anything."""

    space: Path | None
    trials: int | None
    timeout: float | None
    """In minutes."""
    study: str | None
    root: Path
    device: str
    rows: int | None
    seed: int | None
    delete: str | None = None
    """A study to delete, in place of searching."""
    yes: bool = False
    """Whether to delete without asking."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    options = _parse(argv)
    if options.delete is not None:
        from pipeline.deletion import delete

        return delete(options.root, options.delete, sure=options.yes)
    from rich.console import Console

    return search(options, Console(highlight=False))


def search(options: Options, console: Console) -> int:
    """Run or go on with a search, from its file to best.yaml; return the exit status."""
    space, trials = _read_space(options)

    from pipeline.checkpoint import Checkpoints
    from pipeline.interrupts import Interrupts
    from pipeline.prepare import prepare
    from pipeline.store import Store

    trainer = prepare(space, source=_source(options), device=options.device, searching=True, rows=options.rows)
    store = Store(options.root)
    name, _ = store.choose(space, trials=trials, name=options.study)
    with store.lock(name), Interrupts(options.timeout) as interrupts:
        _, exists = store.choose(space, trials=trials, name=name)  # another search may have begun it meanwhile
        study = store.open(name, trials=trials) if exists else store.create(space, name=name, trials=trials)
        console.print(_headline(study, trainer, trials), soft_wrap=True)
        with _tracked(study, store) as tracker, _stopped_by_errors(tracker, _command(options, name, trials)):
            checkpoints = Checkpoints(store.folder(name) / "checkpoints", warn=_warn)
            _run(study, trials, trainer, checkpoints, tracker, interrupts, console)
            _finish(study, store, tracker, console, finished=len(study.ended) >= trials)
    if len(study.ended) >= trials:
        return 0 if study.best() else 1
    console.print(f"{interrupts.reason}; go on with: {_command(options, study.name, trials)}", soft_wrap=True)
    return interrupts.exit_status


def _run(
    study: Study,
    trials: int,
    trainer: Trainer,
    checkpoints: Checkpoints,
    tracker: BackgroundTracker,
    interrupts: Interrupts,
    console: Console,
) -> None:
    """Train group after group until `trials` have ended."""
    from pipeline.display import Progress
    from pipeline.loop import forget_ended, run_group
    from pipeline.optim import replay_rates
    from pipeline.prepare import environment

    for trial in study.ended:  # MLflow passes over those that it has, which after a crash need not be all
        epochs = replay_rates(trial.config, trial.epochs, directions=trainer.workload.directions)
        tracker.log_trial(dataclasses.replace(trial, epochs=epochs))
    with Progress(study, trials=trials, console=console) as progress:
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
                tracker.log_trial(trial)
            progress.group_ended()
    forget_ended(checkpoints, study)


def _read_space(options: Options) -> tuple[SearchSpace, int]:
    """Read the space and the number of trials: from the options, else a named study's own, else the defaults."""
    from pipeline import rules
    from pipeline.space import load_space, space_from_document

    header = None
    if options.study is not None and (options.root / "mlruns" / "optuna.db").exists():
        from pipeline.store import Store

        header = next((h for h in Store(options.root).headers() if h.name == options.study), None)
    if options.space is None and header is not None:
        space = space_from_document(header.document, name=header.space)
    else:
        space = load_space(options.space or DEFAULT_SPACE)
    if options.seed is not None:
        document = {**space.document, "seed": options.seed}
        space = dataclasses.replace(space, seed=options.seed, document=document)
    for warning in rules.warnings(space):
        _warn(warning)
    return space, options.trials or (header.trials if header else DEFAULT_TRIALS)


@contextlib.contextmanager
def _tracked(study: Study, store: Store) -> Iterator[BackgroundTracker]:
    """Tell MLflow of a study from a process of its own; whatever fails there is a warning."""
    from pipeline.background import BackgroundTracker
    from pipeline.strict_yaml import dumps
    from pipeline.tracking import StudyInfo

    space = study.space
    info = StudyInfo(
        name=study.name,
        identity=study.identity,
        experiment=f"{space.workload.name}-{space.workload.model}",
        metric=space.objective.metric,
        direction=space.objective.direction,
        groups=tuple(space.param_groups),
        columns=space.searched_hyperparameters(),
        axes=tuple("log10_base_lr" if name == "base_lr" else name for name in space.shared_hyperparameters()),
        space=dumps(space.document),
        seed=space.seed,
    )
    tracker = BackgroundTracker(store.root, info)
    try:
        yield tracker
    finally:
        for warning in tracker.close(timeout=60):
            _warn(warning)


@contextlib.contextmanager
def _stopped_by_errors(tracker: BackgroundTracker, command: str) -> Iterator[None]:
    """Have MLflow show as stopped what an error stops, and say with it how to go on."""
    try:
        yield
    except Exception as error:
        tracker.interrupt(f"Stopped: {error}")
        if isinstance(error, StorageError):
            raise StorageError(f"{error}\nonce that is mended, go on with: {command}") from error
        raise


def _finish(study: Study, store: Store, tracker: BackgroundTracker, console: Console, *, finished: bool) -> None:
    """Write best.yaml, close MLflow's record, and say what was found and where."""
    from pipeline.display import best_table, strategy_line
    from pipeline.export import config_file
    from pipeline.strict_yaml import write_atomic

    best = study.best()
    path = store.folder(study.name) / "best.yaml"
    if not best:
        why = "each was pruned, diverged or failed" if study.ended else "none has ended yet"
        console.print(f"no trial is complete: {why}")
        for trial in study.ended[-3:]:
            console.print(f"  trial {trial.number} {trial.state}: {trial.reason}", soft_wrap=True)
        note = "No trial is complete."
    else:
        console.print()
        console.print(best_table(study))
        console.print()
        note = f"Best of {len(study.ended)} trials: #{best[0].number}, {study.space.objective.metric} "
        note += f"{best[0].value:.4f}, {strategy_line(best[0].config)}. "
        note += "Train it again: `python -m pipeline.train best.yaml`."
        try:
            write_atomic(path, config_file(study, best[0]))
        except OSError as error:
            raise StorageError(f"{path}: cannot be written: {error.strerror}; see python -m pipeline.export") from None
        train = f"train it again: python -m pipeline.train {cli.quoted(path)}"
        console.print(f"best config   {path}   {train}", soft_wrap=True)
    if finished:
        tracker.finish(best[0] if best else None, note, [path] if best else [])
    else:
        tracker.interrupt(note)
    if best and (view := tracker.view_path()) is not None:
        here = store.root.resolve() == Path.cwd()
        command = "mlflow ui" if here else f"python -m pipeline.ui --root {cli.quoted(store.root)}"
        console.print(f"compare       {command}   then open http://127.0.0.1:5000{view}", soft_wrap=True)


def _headline(study: Study, trainer: Trainer, trials: int) -> str:
    from pipeline.fused import has_rule

    space, size = study.space, min(study.group_size, trials)
    together = f"{size} trials at once" if size > 1 else "one trial at a time"
    if trainer.plain_because is not None:
        together += f", each alone, since the model cannot be rows of a matrix: {trainer.plain_because}"
    elif alone := [name for name in space.optimizers if not has_rule(name)]:
        together += f", those of {' and '.join(alone)} each alone"
    what = f"{trainer.workload.name} · {space.epochs} epochs · {trainer.device}, {together}"
    went_on = f", goes on from trial {len(study.ended)}" if study.ended else ""
    if len(study.ended) >= trials:
        went_on = f": all of its {len(study.ended)} trials have ended; ask for more with --trials"
    return f"{what}   study {study.name}, seed {space.seed}{went_on}"


def _warn(warning: str) -> None:
    print(f"warning: {warning}", file=sys.stderr)


def _source(options: Options) -> str:
    return str(options.space or DEFAULT_SPACE)


def _command(options: Options, study: str, trials: int) -> str:
    root = "" if options.root == Path() else f" --root {cli.quoted(options.root)}"
    device = "" if options.device == "auto" else f" --device {options.device}"
    rows = "" if options.rows is None else f" --rows {options.rows}"
    return f"python -m pipeline.search --study {study} --trials {trials}{root}{device}{rows}"


def _parse(argv: list[str] | None) -> Options:
    parser = argparse.ArgumentParser(prog="python -m pipeline.search", description="Search learning-rate strategies.")
    parser.add_argument("--space", type=Path, metavar="FILE", help=f"what to search (default: {DEFAULT_SPACE.name})")
    at_least_one = cli.whole_number(1)
    parser.add_argument("--trials", type=at_least_one, metavar="N", help=f"in total (default: {DEFAULT_TRIALS})")
    parser.add_argument("--timeout", type=cli.positive_number, metavar="MINUTES", help="stop after this long")
    cli.add_study(parser, help="go on with this study, or begin it (default: the newest unfinished one that fits)")
    cli.add_root(parser)
    cli.add_device(parser)
    rows_help = "train at most N trials as rows of one matrix, which changes no result (default: auto)"
    parser.add_argument("--rows", type=_rows, metavar="auto|N", help=rows_help)
    parser.add_argument("--seed", type=cli.whole_number(0, 2**32 - 1), metavar="N", help="instead of the file's")
    cli.add_delete(parser)
    return Options(**vars(parser.parse_args(argv)))


def _rows(text: str) -> int | None:
    return None if text == "auto" else cli.whole_number(1)(text)


if __name__ == "__main__":
    cli.run(main)
