"""A search on an emulated Ray cluster, whose parts are killed with SIGKILL in mid-run: is anything lost, or done twice?

Two nodes with two emulated GPUs each train on the CPU; ended trials are in PostgreSQL. As trials end, these are killed
one after the other: a worker, a node, the database until ten seconds after the search could not store a trial, the
search itself, which is then started again. At the end every trial must be there once, in the study and in MLflow, and
some are trained again in their recorded places.

    python benchmarks/ray_kills.py --trials 50 --replays 10
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
from live import recorded

from pipeline.app.prepare import prepare
from pipeline.space.placement import from_run_lengths
from pipeline.space.trial import EndedTrial
from pipeline.study.store import Store
from pipeline.training.executor import LocalExecutor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import postgres_server

STUDY = "kills"
AWAY_S = 10
WAITING = "warning: waiting for the database"
CANARY = "canary-" + secrets.token_hex(8)
"""A password of the database that must not be written anywhere."""


def main() -> int:
    """Run the search and the kills; return 0 if everything is there once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=50, metavar="N", help="default: 50")
    parser.add_argument(
        "--replays", type=int, default=10, metavar="N", help="trials that are trained again (default: 10)"
    )
    options = parser.parse_args()
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    from ray.cluster_utils import Cluster

    with postgres_server.server(password=CANARY) as database, tempfile.TemporaryDirectory() as folder:
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        for _ in range(2):
            cluster.add_node(num_cpus=2, num_gpus=2)
        os.environ["PGPASSWORD"] = CANARY  # after the nodes have started, as on machines of their own
        try:
            run = _Run(Path(folder), database, cluster, options.trials)
            run.finish()
            return run.report(options.replays)
        finally:
            cluster.shutdown()


class _Run:
    """The search as a process, and what is killed meanwhile."""

    def __init__(self, root: Path, database: postgres_server.Server, cluster: Any, trials: int) -> None:
        self.root, self.database, self.cluster, self.trials = root, database, cluster, trials
        self.began = time.monotonic()
        self.output = root / "output.txt"
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        """Start the search, or have it go on."""
        command = [sys.executable, "-m", "pipeline.search", "--study", STUDY, "--trials", str(self.trials)]
        command += ["--no-confirm", "--ray", self.cluster.address, "--storage", self.database.uri]
        with self.output.open("ab") as output:
            return subprocess.Popen(command, cwd=self.root, stdout=output, stderr=output)

    def finish(self) -> None:
        """Kill one thing after the other as trials end, and wait for the end of the search."""
        kills: list[Callable[[], None]] = [self.kill_worker, self.kill_node, self.kill_database, self.kill_search]
        due = [(index + 1) * self.trials // 6 for index in range(len(kills))]
        for count, kill in zip(due, kills, strict=True):
            while self.ended() < count and self.process.poll() is None:
                time.sleep(0.2)
            kill()
        self.say(f"the search ends with status {self.process.wait()}")

    def ended(self) -> int:
        """Return the number of stored trials."""
        with contextlib.suppress(Exception), contextlib.closing(Store(self.root, self.database.uri)) as store:
            return next((header.ended for header in store.headers()), 0)
        return 0

    def kill_worker(self) -> None:
        """Kill an actor."""
        everyone = psutil.Process().children(recursive=True)
        self.command_lines = [word for process in everyone for word in process.cmdline()]
        actors = [p for p in everyone if p.cmdline()[:1] and p.cmdline()[0].startswith("ray::Actor")]
        actors[0].kill()
        self.say("a worker is killed")

    def kill_node(self) -> None:
        """Kill a node."""
        self.cluster.remove_node(self.cluster.list_all_nodes()[-1], allow_graceful=False)
        self.say("a node is killed")

    def kill_database(self) -> None:
        """Kill the database, and start it again some time after the search could not store a trial."""
        self.database.kill()
        away = time.monotonic()
        while WAITING not in self.output.read_text() and self.process.poll() is None:
            time.sleep(0.2)
        time.sleep(AWAY_S)
        self.database.start()
        self.say(f"the database was away for {time.monotonic() - away:.0f} s, and waited for")

    def kill_search(self) -> None:
        """Kill the search, and start it again."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.say("the search is killed, and goes on")
        self.process = self.start()

    def say(self, what: str) -> None:
        """Print what happened."""
        print(f"{time.monotonic() - self.began:5.1f} s  {self.ended():>3} trials  {what}", flush=True)

    def report(self, replays: int) -> int:
        """Print what is lost, done twice or trained otherwise; return 0 if nothing is."""
        with contextlib.closing(Store(self.root, self.database.uri)) as store:
            study = store.open(STUDY)
        numbers = [trial.number for trial in study.ended]
        runs = recorded(f"sqlite:///{self.root}/mlflow.db")
        _, executor = prepare(study.space, source=STUDY, device="cpu", searching=True)
        chosen = study.ended[:: max(1, len(numbers) // replays)][:replays]
        otherwise = [trial.number for trial in chosen if not repeats(executor, trial)]
        leaks: list[object] = [word for word in self.command_lines if CANARY in word]
        leaks += [path for path in self.root.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]
        print(f"states {dict(Counter(trial.state.value for trial in study.ended))}")
        print(
            f"lost {self.trials - len(set(numbers))}, twice {len(numbers) - len(set(numbers))}, in MLflow {len(runs)}"
        )
        print(f"trained again {len(chosen)}, with other metrics {otherwise}")
        print(f"the password in {len(self.command_lines)} words of command lines and in files: {leaks}")
        for line in self.output.read_text().splitlines():
            if line.startswith("warning"):
                print(f"    {line}")
        return int(numbers != list(range(self.trials)) or len(runs) != self.trials or bool(otherwise or leaks))


def repeats(executor: LocalExecutor, trial: EndedTrial) -> bool:
    """Return whether a trial trained again in its places has the same metrics; to rounding if its places are broken."""
    placement = from_run_lengths(trial.environment["placement"])
    group = executor.build({0: trial.config}, placement=placement)
    again = [group.train_epoch()[0].metrics for _ in placement]
    if any(place.broken for place in placement):
        return True
    return again[: len(trial.epochs)] == [epoch.metrics for epoch in trial.epochs]


if __name__ == "__main__":
    raise SystemExit(main())
