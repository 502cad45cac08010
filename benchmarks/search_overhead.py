"""Where the wall time of a search goes: `python -m pipeline.search`, the whole command, in a fresh folder.

Without other options the search is that of `frozen_digits.yaml`.

The search runs in a process of its own in which functions of the pipeline are wrapped with a stopwatch. Times are of
the main thread and exclude each other: an import in the middle of a proposal counts as an import. Training is
`ShardedTrials.train_epoch`, in all its processes, with whatever runs beside it, so while MLflow's process works
too it is training that becomes slower; the CPU seconds below the table tell. Turns with the stopwatch alternate
with turns without; the table is that of the median turn.

Not measured: what happens inside training (see `throughput.py`), and how any of it compares to a search written by
hand (see `peer_search.py`).

    python benchmarks/search_overhead.py
    python benchmarks/search_overhead.py --repeats 3 -- --space search_spaces/decay.yaml --trials 50
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
FROZEN = ["--space", str(REPOSITORY / "benchmarks" / "frozen_digits.yaml"), "--trials", "50"]

START = "start of Python"
IMPORTS = "imports"
DATABASES = "creating databases"
TRAINING = "training"
CHECKPOINTS = "checkpoints"
REST = "rest"
END = "end of Python"
CATEGORIES = (
    START,
    IMPORTS,
    "reading and checking",
    DATABASES,
    "probing and choosing rows",
    "building groups",
    TRAINING,
    CHECKPOINTS,
    "Optuna: propose",
    "Optuna: prune",
    "Optuna: store",
    "MLflow in the search's process",
    "waiting for MLflow",
    REST,
    END,
)
WRAPPED = (
    ("pipeline.app.options", "read_space", "reading and checking"),
    ("pipeline.app.prepare", "prepare", "reading and checking"),
    ("pipeline.study.store", "Store.choose", "reading and checking"),
    ("pipeline.study.store", "Store.create", DATABASES),
    ("pipeline.training.executor", "LocalExecutor.__init__", "probing and choosing rows"),
    ("pipeline.training.executor", "LocalExecutor.build", "building groups"),
    ("pipeline.training.shards", "ShardedTrials.train_epoch", TRAINING),
    ("pipeline.study.checkpoint", "Checkpoints.save", CHECKPOINTS),
    ("pipeline.study.checkpoint", "Checkpoints.load", CHECKPOINTS),
    ("pipeline.study.checkpoint", "Checkpoints.clear", CHECKPOINTS),
    ("pipeline.study.study", "Study.next_group", "Optuna: propose"),
    ("pipeline.study.study", "Study.stops", "Optuna: prune"),
    ("pipeline.study.study", "Study.add", "Optuna: store"),
    ("pipeline.tracking.process", "TrackerProcess.__init__", "MLflow in the search's process"),
    ("pipeline.tracking.process", "TrackerProcess.begin", "MLflow in the search's process"),
    ("pipeline.tracking.process", "TrackerProcess.epoch", "MLflow in the search's process"),
    ("pipeline.tracking.process", "TrackerProcess.end", "MLflow in the search's process"),
    ("pipeline.tracking.process", "TrackerProcess.finish", "MLflow in the search's process"),
    ("pipeline.tracking.process", "TrackerProcess.links", "waiting for MLflow"),
    ("pipeline.tracking.process", "TrackerProcess.close", "waiting for MLflow"),
)
"""Module, function, and what its time counts as."""


class Stopwatch:
    """Seconds of the main thread by category; what begins inside another stops that one."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._stack = [REST]
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def category(self, name: str) -> Iterator[None]:
        """Count what happens inside as `name`."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._switch()
        self._stack.append(name)
        try:
            yield
        finally:
            self._switch()
            self._stack.pop()

    def wrap(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """Return the function with its calls counted as `name`."""

        @functools.wraps(function)
        def counted(*arguments: Any, **options: Any) -> Any:
            with self.category(name):
                return function(*arguments, **options)

        return counted

    def _switch(self) -> None:
        now = time.perf_counter()
        self.seconds[self._stack[-1]] += now - self._since
        self._since = now


def main() -> None:
    """Run searches with and without a stopwatch in turns, and print the table of the median one."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--repeats", type=int, default=3, help="turns of each kind (default: 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every turn's figures there")
    parser.add_argument("search", nargs="*", metavar="-- OPTION", default=FROZEN, help="options of the search")
    options = parser.parse_args()
    turns, bare = [], []
    for _ in range(options.repeats):
        turns.append(timed_search(options.search))
        bare.append(_wall_s([sys.executable, "-m", "pipeline.search", *_absolute(options.search)]))
    turns.sort(key=lambda turn: turn["wall_s"])
    _print(turns[len(turns) // 2], turns, bare)
    if options.json:
        options.json.write_text(json.dumps({"turns": turns, "without_stopwatch_wall_s": bare}, indent=2) + "\n")


def timed_search(arguments: Sequence[str]) -> dict[str, Any]:
    """Run a search under the stopwatch in a process and a folder of its own; return its figures."""
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        environment = {"STOPWATCH_FILE": str(figures), "STOPWATCH_START": repr(time.time())}
        wall = _wall_s([sys.executable, str(Path(__file__).resolve()), *_absolute(arguments)], environment)
        turn: dict[str, Any] = json.loads(figures.read_text())
    turn["seconds"][END] = wall - sum(turn["seconds"].values())
    return turn | {"wall_s": wall}


def _wall_s(command: Sequence[str], environment: dict[str, str] | None = None) -> float:
    """Return the wall seconds of a command in a fresh folder."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        environment = {**os.environ, **(environment or {}), "PYTHONPATH": str(REPOSITORY)}
        subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start


def _search_under_stopwatch(figures: Path, started: float) -> None:
    """Be the search's process: wrap, run the command line, write the figures."""
    watch = Stopwatch()
    watch.seconds[START] = time.time() - started
    # Only what is not yet imported comes here.
    bootstrap: Any = importlib._bootstrap
    bootstrap._find_and_load = watch.wrap(bootstrap._find_and_load, IMPORTS)
    for module, path, name in WRAPPED:
        owner = importlib.import_module(module)
        *outer, attribute = path.split(".")
        for part in outer:
            owner = getattr(owner, part)
        setattr(owner, attribute, watch.wrap(getattr(owner, attribute), name))
    from pipeline import search
    from pipeline.app import cli

    try:
        cli.run(functools.partial(search.main, sys.argv[1:]))
    finally:
        with watch.category(REST):
            usage = {who: resource.getrusage(getattr(resource, who)) for who in ("RUSAGE_SELF", "RUSAGE_CHILDREN")}
        cpu = {who: used.ru_utime + used.ru_stime for who, used in usage.items()}
        figures.write_text(json.dumps({"seconds": watch.seconds, "cpu": cpu}))


def _absolute(arguments: Sequence[str]) -> list[str]:
    """Return a command's arguments with the paths of files made absolute, since it runs in another folder."""
    return [str(Path(a).resolve()) if not a.startswith("-") and Path(a).is_file() else a for a in arguments]


def _print(turn: dict[str, Any], turns: Sequence[dict[str, Any]], bare: Sequence[float]) -> None:
    wall, seconds = turn["wall_s"], turn["seconds"]
    print(f"{'':34}{'seconds':>9}{'part':>8}")
    for name in CATEGORIES:
        print(f"{name:34}{seconds.get(name, 0.0):9.2f}{seconds.get(name, 0.0) / wall:8.1%}")
    print(f"{'whole command':34}{wall:9.2f}{1:8.1%}")
    cpu = turn["cpu"]
    print(f"\nCPU seconds: {cpu['RUSAGE_SELF']:.1f} the search, {cpu['RUSAGE_CHILDREN']:.1f} its workers and MLflow")
    print("whole command, seconds: " + " ".join(f"{t['wall_s']:.1f}" for t in turns), end="")
    print("; without stopwatch: " + " ".join(f"{s:.1f}" for s in sorted(bare)))
    parts = sorted(_training_part(turn) for turn in turns)
    print(f"RATIO training to all beyond imports and creating databases  {_training_part(turn):.2f}", end="")
    print(f"   (from {parts[0]:.2f} to {parts[-1]:.2f})")
    costs = sorted(turn["seconds"].get(CHECKPOINTS, 0.0) / turn["seconds"][TRAINING] for turn in turns)
    print(f"RATIO checkpoints to training  {costs[len(costs) // 2]:.2%}   (from {costs[0]:.2%} to {costs[-1]:.2%})")


def _training_part(turn: dict[str, Any]) -> float:
    seconds = turn["seconds"]
    beyond = turn["wall_s"] - sum(seconds.get(name, 0.0) for name in (START, IMPORTS, DATABASES))
    return float(seconds[TRAINING] / beyond)


if __name__ == "__main__":
    if "STOPWATCH_FILE" in os.environ:
        _search_under_stopwatch(Path(os.environ["STOPWATCH_FILE"]), float(os.environ["STOPWATCH_START"]))
    else:
        main()
