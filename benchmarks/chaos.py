"""Kill a search again and again at random moments, and check that nothing is lost.

After each kill the same command goes on. A kill is SIGKILL to the search's process, to the tracker process (MLflow), to
a process that trains trials, or to all of them. Before each kill and after each end, trials and epochs in optuna.db and
the checkpoints are acknowledged: noted in a file outside the search's folder. A finished search must equal a search
that was never killed: each trial once, with equal values, no run in progress, and MLflow's histories complete and
without a step twice, and equal models are kept. Then the next search begins, until every kill is spent.

    python benchmarks/chaos.py --kills 200 --seed 1
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from pipeline.files.sqlite import sqlite_uri
from pipeline.study.checkpoint import Checkpoints
from pipeline.study.store import Store

REPOSITORY = Path(__file__).resolve().parent.parent
STUDY = "chaos"
SPACE = """
workload: {{name: digits, model: mlp}}
epochs: {epochs}
batch_size: 64
optimizer:
  sgd:   {{base_lr: {{low: 1e-2, high: 1.0, log: true}}, momentum: {{choices: [0.0, 0.9]}}}}
  adamw: {{base_lr: {{low: 1e-4, high: 1e-1, log: true}}}}
  rprop: {{base_lr: {{low: 1e-4, high: 1e-2, log: true}}}}
scheduler:
  constant: {{}}
param_groups:
  head: {{pattern: "fc.*", lr_ratio: {{low: 0.1, high: 10, log: true}}}}
  body: {{pattern: "*"}}
sampler: {{name: tpe, n_startup_trials: 4, group_size: 6}}
pruner: {{name: successive_halving, min_resource: 3}}
"""
VICTIMS = ("search", "mlflow", "worker", "all")


@dataclass
class Round:
    """One search in a folder of its own, and the trials that are acknowledged so far."""

    root: Path
    command: list[str]
    log: IO[str]
    kills: Counter[str] = field(default_factory=Counter)
    epochs: dict[int, list[dict[str, float]]] = field(default_factory=lambda: defaultdict(list))
    """Trial number to the metrics of the acknowledged epochs."""
    verdicts: dict[int, str] = field(default_factory=dict)
    done: bool = False
    """Whether the search has finished and MLflow has every trial."""

    def start(self) -> subprocess.Popen[str]:
        """Start or resume the search."""
        # In the search's own folder, where every file left over belongs to the search.
        return subprocess.Popen(
            self.command,
            cwd=self.root,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self, process: subprocess.Popen[str]) -> None:
        """Wait until the process ends, and acknowledge its trials."""
        _, errors = process.communicate()
        lacks = process.returncode == 1 and "not recorded" in errors
        assert lacks or process.returncode in (0, -signal.SIGKILL), errors
        self.done = process.returncode == 0
        self.acknowledge()

    def acknowledge(self) -> None:
        """Note the trials of the database and of the newest checkpoint."""
        for number, epochs, verdict in [*stored(self.root), *checkpointed(self.root)]:
            before = self.epochs[number]
            assert epochs[: len(before)] == before[: len(epochs)], f"trial {number} has changed"
            self.epochs[number] = max(before, epochs, key=len)
            if verdict:
                assert self.verdicts.setdefault(number, verdict) == verdict, f"trial {number} ended twice"
            self.log.write(json.dumps({"trial": number, "epochs": len(epochs), "verdict": verdict}) + "\n")
        self.log.flush()


def main() -> int:
    """Spend the kills, round after round, and print how many of each kind there were."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="number of kills (default: 20)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of moments and victims (default: 0)")
    parser.add_argument("--trials", type=int, default=24, metavar="N", help="trials per search (default: 24)")
    parser.add_argument("--epochs", type=int, default=60, metavar="N", help="epochs per trial (default: 60)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), options)
    return 0


def run(folder: Path, options: argparse.Namespace) -> None:
    """Run one search without kills, then searches that are killed."""
    start = time.perf_counter()
    random_ = random.Random(options.seed)
    began, whole = time.perf_counter(), new_round(folder / "whole", options)
    finish(whole)
    training = max(1.0, time.perf_counter() - began - 4)  # imports take about 4 s
    expected = record(whole.root)
    kills: Counter[str] = Counter()
    rounds = resumed = 0
    while (left := options.kills - kills.total()) > 0:
        rounds += 1
        one = new_round(folder / f"round-{rounds}", options)
        while left > one.kills.total() and attack(one, random_, training=training):
            resumed += one.epochs.keys() > one.verdicts.keys()
        finish(one)
        check(one, record(one.root), expected, trials=options.trials)
        kills += one.kills
        print(f"round {rounds}: {_words(one.kills)}, {len(one.epochs)} trials as expected", flush=True)
    seconds = time.perf_counter() - start
    print(f"KILLS {kills.total()} in {rounds} searches of {options.trials} trials: {_words(kills)}")
    print(f"{resumed} of the deaths left a group in a checkpoint; nothing lost, nothing twice; {seconds:.0f} s")


def new_round(root: Path, options: argparse.Namespace) -> Round:
    """Return a search that has not started."""
    root.mkdir()
    (root / "space.yaml").write_text(SPACE.format(epochs=options.epochs))
    command = [sys.executable, "-m", "pipeline.search", "--space", "space.yaml", "--study", STUDY, "--device", "cpu"]
    log = root.with_suffix(".acknowledged.jsonl").open("w")
    return Round(root, [*command, "--trials", str(options.trials)], log)


def attack(one: Round, random_: random.Random, *, training: float) -> bool:
    """Run the search until it is killed or finished; return whether trials are left."""
    process = one.start()
    assert process.stdout is not None
    if random_.random() < 0.8:
        # Training begins after the first line; without waiting, a kill may hit imports or new databases.
        process.stdout.readline()
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(random_.uniform(0, training / 6))
            break
        victim = random_.choice(VICTIMS)
        one.acknowledge()
        if kill(process, victim):
            one.kills[victim] += 1
        if victim in ("search", "all"):
            break
    one.end(process)
    return not one.done


def kill(process: subprocess.Popen[str], victim: str) -> bool:
    """Kill the search's process, its children of one kind, or all of them; return whether there was one."""
    victims = [pid for pid, kind in children(process.pid) if victim in (kind, "all")]
    if victim in ("search", "all") and process.poll() is None:
        victims.append(process.pid)
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return bool(victims)


def children(pid: int) -> list[tuple[int, str]]:
    """Return a process's children and their kinds: a fork that trains trials has its parent's command line."""
    listed = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    rows = [line.split(maxsplit=1) for line in listed.stdout.splitlines()]
    return [(int(pid), "mlflow" if "pipeline.tracking.server" in args else "worker") for pid, args in rows]


def finish(one: Round) -> None:
    """Run the search to its end, and again while MLflow misses a trial."""
    for _ in range(3):
        if not one.done:
            one.end(one.start())
    assert one.done


def stored(root: Path) -> Iterator[tuple[int, list[dict[str, float]], str]]:
    """Yield the trials of the database: number, metrics of each epoch, verdict."""
    store = Store(root)
    if any(header.name == STUDY for header in store.headers()):
        for trial in store.open(STUDY).ended:
            yield trial.number, [dict(epoch.metrics) for epoch in trial.epochs], trial.state.value


def checkpointed(root: Path) -> Iterator[tuple[int, list[dict[str, float]], str | None]]:
    """Yield the trials of the newest checkpoint; the search may remove a file while it is read."""
    checkpoints = Checkpoints(Store(root).folder(STUDY) / "checkpoints", warn=lambda _: None)
    for _, content in checkpoints.load():
        for number, trial in content["trials"].items():
            yield (
                number,
                [dict(epoch["metrics"]) for epoch in trial["epochs"] if not epoch["diverged"]],
                (trial["verdict"][0] if trial["verdict"] else None),
            )
        return


def record(root: Path) -> dict[str, Any]:
    """Return the record of a finished search, without times and MLflow's random names."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    client = MlflowClient(sqlite_uri(root / "mlflow.db"))
    runs = [run for e in client.search_experiments() for run in client.search_runs([e.experiment_id], max_results=1000)]
    found: dict[str, Any] = {"trials": [], "runs": [], "models": {}}
    for file in sorted((Store(root).folder(STUDY) / "models").iterdir()):
        found["models"][file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    for trial in Store(root).open(STUDY).ended:
        metrics = [epoch.metrics for epoch in trial.epochs]
        found["trials"].append((trial.number, trial.params, trial.state, trial.reason, trial.value, metrics))
    for run in sorted(runs, key=lambda run: (run.data.tags["hpo.kind"], int(run.data.tags.get("hpo.trial", -1)))):
        curves = {
            name: sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, name))
            for name in run.data.metrics
        }
        # When they were logged depends on the time; only their last values do not.
        last = {name: curves.pop(name)[-1][1] for name in list(curves) if name == "rank" or name.startswith("study/")}
        last.pop("study/trial_epochs_per_s", None)
        files = sorted(file.path for file in client.list_artifacts(run.info.run_id))
        number, kind = run.data.tags.get("hpo.trial"), run.data.tags["hpo.kind"]
        found["runs"].append((number, kind, run.info.status, run.data.params, curves, last, files))
    return found


def check(one: Round, found: dict[str, Any], expected: dict[str, Any], *, trials: int) -> None:
    """Compare a search's record with the acknowledged trials, and with the search that was never killed.

    Raises:
        AssertionError: A trial or a step is missing, is there twice, or differs.
    """
    assert [number for number, *_ in found["trials"]] == list(range(trials))
    by_number = {number: (epochs, verdict) for number, epochs, verdict in stored(one.root)}
    for number, epochs in one.epochs.items():
        assert by_number[number][0][: len(epochs)] == epochs, f"trial {number} lost an epoch"
        assert by_number[number][1] == one.verdicts.get(number, by_number[number][1])
    assert found["trials"] == expected["trials"]
    numbers = [number for number, kind, *_ in found["runs"] if kind == "trial"]
    assert numbers == [str(number) for number in range(trials)], numbers
    assert all(status != "RUNNING" for _, _, status, *_ in found["runs"])
    for *_, curves, _, _ in found["runs"]:
        assert all(len({step for step, _ in points}) == len(points) for points in curves.values())
    assert found["runs"] == expected["runs"]
    assert found["models"] == expected["models"]
    left = [path for path in one.root.rglob("*") if path.suffix in (".tmp", ".new")]
    left += (Store(one.root).folder(STUDY) / "checkpoints").glob("*")
    assert left == [], left


def _words(kills: Counter[str]) -> str:
    return ", ".join(f"{victim} {kills[victim]}" for victim in VICTIMS)


if __name__ == "__main__":
    sys.exit(main())
