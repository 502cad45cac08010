"""What a search of many small trials costs: early and late, at its exit, and when the finished study is used again.

A model of 31 parameters trains for 2 epochs, so nearly everything is what the search does around training. The search
is the whole command. It is watched from outside: every half second, the CPU time of its processes is read, and how many
trials `optuna.db` and `mlflow.db` have. An early and a late window of whole groups give the CPU time per trial; the
search's own, with the processes that train, is counted by trials in optuna.db, that of MLflow's process by runs that
have ended.

The finished study is then opened, exported and resumed: CPU time of `Store.open`, the second time, without imports, and
of the whole commands with their processes.

    python benchmarks/scale.py --trials 100 1000 --samplers tpe random
    python benchmarks/scale.py --trials 5000 --samplers tpe
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from torch import nn
from torch.utils.data import TensorDataset

from pipeline.study.store import Store
from pipeline.workloads.workload import Workload

REPOSITORY = Path(__file__).resolve().parent.parent
STUDY = "scale"
WATCH_EVERY_S = 0.5
WINDOW = 64
"""Trials, a number of whole groups; a window has two or four times as many."""
SPACE = """
workload: {{name: own, function: "{file}:tiny"}}
epochs: 2
batch_size: 32
objective: {{metric: val/loss, direction: minimize}}
optimizer:
  sgd:   {{base_lr: {{low: 1e-3, high: 1.0, log: true}}, momentum: {{choices: [0.0, 0.9]}}}}
  adamw: {{base_lr: {{low: 1e-4, high: 1e-1, log: true}}, weight_decay: {{low: 1e-4, high: 1e-1, log: true}}}}
scheduler:
  step: {{step_size: {{low: 1, high: 2}}, gamma: {{low: 0.05, high: 0.9, log: true}}}}
param_groups:
  head: {{pattern: "2.*", lr_ratio: {{low: 0.1, high: 10, log: true}}}}
  body: {{pattern: "*"}}
sampler: {{name: {sampler}}}
pruner: {{name: none}}
"""
OPEN = """
import sys, time
from pathlib import Path
from pipeline.study.store import Store
Store(Path(sys.argv[1])).open(sys.argv[2])
began = time.process_time()
Store(Path(sys.argv[1])).open(sys.argv[2])
print(time.process_time() - began)
"""


def tiny() -> Workload:
    """Return a regression of 4 numbers to one, by 31 parameters."""
    numbers = torch.Generator().manual_seed(0)
    inputs = torch.randn(160, 4, generator=numbers)
    targets = inputs.prod(dim=1, keepdim=True)
    return Workload(
        name="tiny",
        build_model=lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1), nn.Flatten()),
        train=TensorDataset(inputs[:128], targets[:128]),
        val=TensorDataset(inputs[128:], targets[128:]),
        loss=nn.functional.mse_loss,
    )


@dataclass
class Watched:
    """What was seen of a search while it ran."""

    stored: dict[int, float] = field(default_factory=dict)
    """Number of trials in optuna.db to CPU seconds of the search and of the processes that train."""
    recorded: dict[int, float] = field(default_factory=dict)
    """Number of runs that have ended in mlflow.db to CPU seconds of MLflow's process."""
    memory: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Kind of process to its most resident memory, in MiB; of several training processes, the sum."""
    last_trial: float = 0.0
    """When the last trial was first seen in optuna.db; seconds since 1970."""
    wall_s: float = 0.0
    exit_s: float = 0.0
    """Seconds from the last trial to the exit."""


def main() -> int:
    """Run each search, use its study again, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, nargs="+", default=[100, 1000], metavar="N", help="default: 100 1000")
    parser.add_argument("--samplers", nargs="+", default=["tpe", "random"], metavar="NAME", help="default: tpe random")
    options = parser.parse_args()
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    for sampler in options.samplers:
        for trials in options.trials:
            print(f"{sampler}, {trials} trials", flush=True)
            with tempfile.TemporaryDirectory() as folder:
                measure(Path(folder), sampler, trials)
    return 0


def measure(root: Path, sampler: str, trials: int) -> None:
    """Run a search and use its study again; print the figures."""
    (root / "space.yaml").write_text(SPACE.format(sampler=sampler, file=Path(__file__).resolve()))
    search = ["-m", "pipeline.search", "--space", "space.yaml", "--no-confirm", "--device", "cpu", "--study", STUDY]
    command = [sys.executable, *search, "--trials", str(trials)]
    watched = watch(root, command, trials)
    last_whole = trials // WINDOW * WINDOW
    windows = {"early": (WINDOW, 3 * WINDOW), "late": (last_whole - 4 * WINDOW, last_whole)}
    for name, (first, last) in windows.items():
        if 0 < first < last <= trials:
            searching = slope(watched.stored, first, last)
            recording = slope(watched.recorded, first, last)
            print(
                f"  {name}, trials {first} to {last}: {searching:.1f} ms of CPU per trial in the search,"
                f" {recording:.1f} in MLflow's process"
            )
    memory = ", ".join(f"{kind} {mib:.0f}" for kind, mib in sorted(watched.memory.items()))
    files = [path for path in root.rglob("*") if path.is_file() and path.parent != root] + list(root.glob("*.db"))
    print(f"  whole search {watched.wall_s:.1f} s, from the last trial to the exit {watched.exit_s:.1f} s")
    print(
        f"  peak memory in MiB: {memory}; {len(files)} files of {sum(f.stat().st_size for f in files) / 2**20:.1f} MiB"
    )
    print(f"  MLflow lacks {lacks(root)} points or ends of trials")
    opened = subprocess.run([sys.executable, "-c", OPEN, str(root), STUDY], **_within(root), stdout=subprocess.PIPE)
    print(f"  opening {float(opened.stdout):.2f} s of CPU")
    for words, again in {
        "export": [sys.executable, "-m", "pipeline.export", "--study", STUDY, "--out", "winner.yaml"],
        "resume": command,
    }.items():
        cpu, wall = timed(root, again)
        print(f"  {words} {cpu:.1f} s of CPU, {wall:.1f} s", flush=True)


def watch(root: Path, command: Sequence[str], trials: int) -> Watched:
    """Run a search to its end, and watch it."""
    watched, began = Watched(), time.time()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, **_within(root))
    while process.poll() is None:
        time.sleep(WATCH_EVERY_S)
        stored = count(root / "mlruns" / "optuna.db", "SELECT COUNT(*) FROM trials")
        recorded = count(root / "mlflow.db", "SELECT COUNT(*) FROM runs WHERE status != 'RUNNING'")
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            cpu, memory = used(psutil.Process(process.pid))
            watched.stored.setdefault(stored, cpu["search"])
            watched.recorded.setdefault(recorded, cpu["mlflow"])
            for kind, mib in memory.items():
                watched.memory[kind] = max(watched.memory[kind], mib)
        if stored >= trials and not watched.last_trial:
            watched.last_trial = time.time()
    assert process.returncode == 0, process.returncode
    watched.wall_s, watched.exit_s = time.time() - began, time.time() - watched.last_trial
    return watched


def used(search: psutil.Process) -> tuple[dict[str, float], dict[str, float]]:
    """Return the CPU seconds and the resident MiB of a search, its training processes and MLflow's process."""
    times = search.cpu_times()
    cpu = {"search": times.user + times.system + times.children_user + times.children_system, "mlflow": 0.0}
    memory = defaultdict(float, search=search.memory_info().rss / 2**20)
    for child in search.children():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            kind = "mlflow" if any("pipeline.tracking.server" in word for word in child.cmdline()) else "training"
            times = child.cpu_times()
            cpu["mlflow" if kind == "mlflow" else "search"] += times.user + times.system
            memory[kind] += child.memory_info().rss / 2**20
    return cpu, memory


def count(database: Path, query: str) -> int:
    """Return a number from a database; 0 while the database is not there."""
    if not database.exists():
        return 0
    try:
        with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
            return int(connection.execute(query).fetchone()[0])
    except sqlite3.OperationalError:  # locked, or its tables are not made yet
        return 0


def slope(seen: dict[int, float], first: int, last: int) -> float:
    """Return milliseconds per trial between two numbers of trials, each as it was first reached."""
    start, end = (min(number for number in seen if number >= bound) for bound in (first, last))
    return 1000 * (seen[end] - seen[start]) / max(end - start, 1)


def lacks(root: Path) -> int:
    """Return how many points of `val/loss` or ends of trials MLflow lacks."""
    with contextlib.closing(sqlite3.connect(root / "mlflow.db")) as connection:
        points = connection.execute(
            "SELECT COUNT(DISTINCT run_uuid || ':' || step) FROM metrics WHERE key = 'val/loss'"
        )
        ended = connection.execute("SELECT COUNT(*) FROM runs WHERE status IN ('FINISHED', 'KILLED', 'FAILED')")
        has = points.fetchone()[0] + ended.fetchone()[0] - 1  # one run is the study's
    trials = Store(root).open(STUDY).ended
    return sum(1 + sum(epoch.finished for epoch in trial.epochs) for trial in trials) - int(has)


def timed(root: Path, command: Sequence[str]) -> tuple[float, float]:
    """Run a command; return the CPU seconds of all its processes and its wall seconds."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, **_within(root))
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - began
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def _within(root: Path) -> dict[str, Any]:
    return {"cwd": root, "env": {**os.environ, "PYTHONPATH": str(REPOSITORY)}}


if __name__ == "__main__":
    sys.exit(main())
