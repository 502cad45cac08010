"""Poll MLflow while a search runs: how late are the epochs of running trials? And is everything there afterwards?

Every few seconds MLflow's client reads what each run has. A point's timestamp is the time at which its epoch ended, so
afterwards it is known which points a poll should have seen, and how old the oldest point was that it did not see.
The tracker process can be killed meanwhile, at random moments; each kill costs the seconds of its new start.

    python benchmarks/live.py --trials 50 --kills 5
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from chaos import children

from pipeline.files.sqlite import sqlite_uri
from pipeline.study.store import Store

FROZEN = Path(__file__).resolve().parent / "frozen_digits.yaml"
STUDY = "live"
METRIC = "val/loss"
POLL_EVERY_S = 5.0
Steps = dict[int, list[int]]
"""Trial number to the steps that its run has."""


def main() -> int:
    """Run a search, poll it, and print how late points were, and what is missing or there twice in the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=50, metavar="N", help="trials of the search (default: 50)")
    parser.add_argument("--space", default=str(FROZEN), help="search space (default: frozen_digits.yaml)")
    parser.add_argument("--kills", type=int, default=0, metavar="N", help="kills of the tracker process (default: 0)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the moments (default: 0)")
    options = parser.parse_args()
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        command = [sys.executable, "-m", "pipeline.search", "--space", options.space, "--trials", str(options.trials)]
        process = subprocess.Popen([*command, "--study", STUDY, "--root", folder], stdout=subprocess.PIPE, text=True)
        assert process.stdout
        process.stdout.readline()  # training begins after it
        polls = poll(process, root, random.Random(options.seed), kills=options.kills)
        print(process.communicate()[0].splitlines()[-1])
        report(root, polls)
    return process.returncode


def poll(
    process: subprocess.Popen[str], root: Path, random_: random.Random, *, kills: int
) -> list[tuple[float, Steps]]:
    """Return what MLflow had at each time, in seconds since 1970, while the search ran."""
    polls = []
    while process.poll() is None:
        time.sleep(POLL_EVERY_S)
        now = time.time()
        polls.append((now, {number: [step for step, _ in points] for number, points in recorded(uri_of(root)).items()}))
        if kills and random_.random() < 0.3:
            for pid, kind in children(process.pid):
                if kind == "mlflow":
                    os.kill(pid, signal.SIGKILL)
                    kills -= 1
    return polls


def uri_of(root: Path) -> str:
    """Return the URI of a root's MLflow database."""
    return sqlite_uri(root / "mlflow.db")


def recorded(uri: str) -> dict[int, list[tuple[int, float]]]:
    """Return the points of each trial's run in an MLflow store, as (step, seconds since 1970)."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    found: defaultdict[int, list[tuple[int, float]]] = defaultdict(list)
    for experiment in client.search_experiments():
        for run in client.search_runs([experiment.experiment_id], "tags.`hpo.kind` = 'trial'", max_results=10_000):
            points = client.get_metric_history(run.info.run_id, METRIC)
            found[int(run.data.tags["hpo.trial"])] += [(point.step, point.timestamp / 1000) for point in points]
    return found


def report(root: Path, polls: list[tuple[float, Steps]]) -> None:
    """Print the ages of the oldest points that polls did not see, and compare the end with optuna.db."""
    whole = recorded(uri_of(root))
    late = []
    for now, seen in polls:
        unseen = [at for n, points in whole.items() for step, at in points if at < now and step not in seen.get(n, [])]
        late.append(now - min(unseen, default=now))
    late.sort()
    print(
        f"{len(polls)} polls: the oldest epoch not in MLflow was {late[len(late) // 2]:.1f} s old in the median, ",
        end="",
    )
    print(f"{late[-1]:.1f} s at most")
    missing, twice = compared(root, whole, study=STUDY)
    print(f"afterwards {missing} points are missing, {twice} are there twice")


def compared(root: Path, whole: Mapping[int, list[tuple[int, float]]], *, study: str) -> tuple[int, int]:
    """Return how many points of a study MLflow lacks, and how many it has twice; `whole` is from `recorded`."""
    missing = twice = 0
    for trial in Store(root).open(study).ended:
        steps = [step for step, _ in whole.get(trial.number, [])]
        missing += len({epoch.step for epoch in trial.epochs if epoch.finished} - set(steps))
        twice += len(steps) - len(set(steps))
    return missing, twice


if __name__ == "__main__":
    sys.exit(main())
