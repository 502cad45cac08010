"""Search learning-rate strategies: `python -m pipeline.search --trials 50`, or `search` from Python.

`search` reads a search space, asks the study for trials, turns each into a TrialConfig, splits the model into
parameter groups, builds optimizers and schedulers, trains epochs, reports metrics to the study and to MLflow, and
exports best.yaml.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pipeline import cli
from pipeline.config import Own
from pipeline.errors import InvalidInput, Problem, StorageError
from pipeline.overrides import Overrides, override

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.background import BackgroundTracker
    from pipeline.checkpoint import Checkpoints
    from pipeline.space import SearchSpace
    from pipeline.store import Store, StudyHeader
    from pipeline.study import Study
    from pipeline.trainers import Trainer
    from pipeline.trial import EndedTrial
    from pipeline.workloads import Workload

SPACES = Path(__file__).resolve().parent.parent / "search_spaces"
DEFAULT_SPACE, OWN_SPACE = SPACES / "default.yaml", SPACES / "own.yaml"
"""What is searched if no file is named: for the embedded digits, and for a workload of one's own."""
DEFAULT_TRIALS = 50


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a search is asked to do, read but not yet checked against anything."""

    space: Path | Mapping[str, Any] | None = None
    overrides: Overrides = field(default_factory=dict)
    workload: Workload | None = None
    """In place of the one that the space names."""
    trials: int | None = None
    timeout: float | None = None
    """In minutes."""
    study: str | None = None
    root: Path = Path()
    device: str = "auto"
    rows: int | None = None


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


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    options = _parse(argv)
    from rich.console import Console

    return _search(options, Console(highlight=False)).exit_status


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
        space: A search-space file, or what one says; None: a ready-made one.
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

    space = Path(space) if isinstance(space, str) else space
    options = Options(
        space=space, trials=trials, timeout=timeout, study=study, root=Path(root), device=device, rows=rows
    )
    return _search(_with_workload(options, workload, overrides), Console(highlight=False, quiet=quiet))


def _search(options: Options, console: Console) -> SearchResult:
    """Run or go on with a search, from its file to best.yaml."""
    space, trials = _read_space(options)

    from pipeline.checkpoint import Checkpoints
    from pipeline.prepare import prepare
    from pipeline.store import Store

    cli.say_own_code(space, functools.partial(console.print, soft_wrap=True, markup=False))
    trainer = prepare(
        space,
        source=_source(options),
        device=options.device,
        searching=True,
        rows=options.rows,
        workload=options.workload,
    )
    store = Store(options.root)
    name, exists = store.choose(space, trials=trials, name=options.study)
    with store.lock(name), _Interrupts(options.timeout) as interrupts:
        study = store.open(name, trials=trials) if exists else store.create(space, name=name, trials=trials)
        console.print(_headline(study, trainer, trials), soft_wrap=True)
        with _tracked(study, store) as tracker:
            checkpoints = Checkpoints(store.folder(name) / "checkpoints", warn=_warn)
            _run(study, trials, trainer, checkpoints, tracker, interrupts, console)
            _finish(study, store, tracker, console, finished=len(study.ended) >= trials)
    best = next(iter(study.best()), None)
    status = 0 if best else 1
    if len(study.ended) < trials:
        console.print(f"{interrupts.reason}; go on with: {_command(options, study, trials)}", soft_wrap=True)
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
    tracker: BackgroundTracker,
    interrupts: _Interrupts,
    console: Console,
) -> None:
    """Train group after group until `trials` have ended."""
    from pipeline.display import Progress
    from pipeline.loop import run_group
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
    if not interrupts.reason:
        checkpoints.clear()  # a crash may have left those of the last group


def _read_space(options: Options) -> tuple[SearchSpace, int]:
    """Read the space and the number of trials: from the options, else a named study's own, else the defaults."""
    from pipeline import rules
    from pipeline.space import build_space

    header = None
    if options.study is not None and (options.root / "mlruns" / "optuna.db").exists():
        from pipeline.store import Store

        header = next((h for h in Store(options.root).headers() if h.name == options.study), None)
    if options.space is None and header is not None:
        document = override(header.document, options.overrides)
        _refuse_stored_code(header, options)
        space = build_space(document, source=f"--study {header.name}", name=header.space)
    else:
        space = _given_space(options)
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
        experiment=space.workload.title,
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


def _finish(study: Study, store: Store, tracker: BackgroundTracker, console: Console, *, finished: bool) -> None:
    """Write best.yaml, close MLflow's record, and say what was found and where."""
    from pipeline.display import best_table, strategy_line
    from pipeline.export import config_file
    from pipeline.strict_yaml import write_atomic

    best = study.best()
    path = _best_file(study, store)
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
        note += f"{best[0].score}, {strategy_line(best[0].config)}. "
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


def _refuse_stored_code(header: StudyHeader, options: Options) -> None:
    """A database may come from anyone, so it does not say which code is run: a person does."""
    workload = header.document["workload"]
    if workload["name"] == "own" and "workload" not in options.overrides:
        message = f"trains {workload['function']}, code that is run only when you name it: add --workload"
        raise InvalidInput("--study", [Problem(header.name, f"{message} {workload['function']}")])


def _given_space(options: Options) -> SearchSpace:
    from pipeline.space import build_space, load_space, study_name

    if isinstance(options.space, Mapping):
        return build_space(override(options.space, options.overrides), source="space", name="search")
    space = load_space(_space_file(options), options.overrides)
    if options.space is None and isinstance(space.workload, Own):
        space = dataclasses.replace(space, name=study_name(space.workload.title))
    return space


def _space_file(options: Options) -> Path:
    assert not isinstance(options.space, Mapping)
    return options.space or (OWN_SPACE if "workload" in options.overrides else DEFAULT_SPACE)


def _warn(warning: str) -> None:
    print(f"warning: {warning}", file=sys.stderr)


def _source(options: Options) -> str:
    file = "space" if isinstance(options.space, Mapping) else str(_space_file(options))
    workload = options.overrides.get("workload", {})
    return f"{file} with --workload {workload['function']}" if "function" in workload else file


def _best_file(study: Study, store: Store) -> Path:
    return store.folder(study.name) / "best.yaml"


def _with_workload(
    options: Options, workload: Callable[[], Workload] | Workload | str | None, overrides: Overrides
) -> Options:
    """Return options with a workload that was given from Python, and the changes to the space."""
    if workload is None or isinstance(workload, str):
        chosen = {"workload": cli.workload_choice(workload)} if workload else {}
        return dataclasses.replace(options, overrides={**chosen, **overrides})
    from pipeline.workloads import own

    place = f"{getattr(workload, '__module__', 'python')}:{getattr(workload, '__qualname__', type(workload).__name__)}"
    made = own.call(workload, place) if callable(workload) else own.check_form(workload, "workload")
    chosen = {"workload": {"name": "own", "function": place if callable(workload) else f"python:{made.name}"}}
    return dataclasses.replace(options, overrides={**chosen, **overrides}, workload=made)


def _command(options: Options, study: Study, trials: int) -> str:
    """Return the command that goes on with a search that was stopped."""
    own = study.space.workload
    workload = f" --workload {cli.quoted(Path(own.function))}" if isinstance(own, Own) else ""
    root = "" if options.root == Path() else f" --root {cli.quoted(options.root)}"
    device = "" if options.device == "auto" else f" --device {options.device}"
    rows = "" if options.rows is None else f" --rows {options.rows}"
    return f"python -m pipeline.search --study {study.name} --trials {trials}{workload}{root}{device}{rows}"


class _Interrupts:
    """Ctrl-C, SIGTERM and the time limit, asked about between epochs; a second signal ends the process at once."""

    def __init__(self, minutes: float | None) -> None:
        self.reason: str | None = None
        self.exit_status = 0
        self._deadline = time.monotonic() + minutes * 60 if minutes is not None else None
        self._minutes = minutes

    def __enter__(self) -> _Interrupts:
        if threading.current_thread() is not threading.main_thread():
            self._handlers: dict[signal.Signals, Any] = {}  # a signal is the main thread's to handle
            return self
        self._handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def asked(self) -> bool:
        """Say whether to stop now."""
        if self._deadline is not None and time.monotonic() >= self._deadline and self.reason is None:
            self.reason = f"stopped after {self._minutes:g} minutes"
        return self.reason is not None

    def _on_signal(self, number: int, frame: object) -> None:
        if self.exit_status:  # stored trials are on the disk, and MLflow's process ends with this one
            with contextlib.suppress(OSError):
                os.write(2, b"\x1b[?25h\n" if os.isatty(2) else b"")  # the progress display had hidden the cursor
            os._exit(self.exit_status)
        self.reason = "interrupted"
        self.exit_status = 128 + number


def _parse(argv: list[str] | None) -> Options:
    parser = argparse.ArgumentParser(prog="python -m pipeline.search", description="Search learning-rate strategies.")
    space_help = f"what to search (default: {DEFAULT_SPACE.name}; with --workload, {OWN_SPACE.name})"
    parser.add_argument("--space", type=Path, metavar="FILE", help=space_help)
    cli.add_overrides(parser, workload=True)
    at_least_one = cli.whole_number(1)
    parser.add_argument("--trials", type=at_least_one, metavar="N", help=f"in total (default: {DEFAULT_TRIALS})")
    parser.add_argument("--timeout", type=cli.positive_number, metavar="MINUTES", help="stop after this long")
    cli.add_study(parser, help="go on with this study, or begin it (default: the newest unfinished one that fits)")
    cli.add_root(parser)
    cli.add_device(parser)
    rows_help = "train at most N trials as rows of one matrix, which changes no result (default: auto)"
    parser.add_argument("--rows", type=_rows, metavar="auto|N", help=rows_help)
    parser.add_argument("--seed", type=cli.whole_number(0, 2**32 - 1), metavar="N", help="instead of the file's")
    arguments = parser.parse_args(argv)
    names = {field.name for field in dataclasses.fields(Options)} & vars(arguments).keys() - {"workload"}
    return Options(**{name: getattr(arguments, name) for name in names}, overrides=cli.overrides_of(arguments))


def _rows(text: str) -> int | None:
    return None if text == "auto" else cli.whole_number(1)(text)


if __name__ == "__main__":
    cli.run(main)
