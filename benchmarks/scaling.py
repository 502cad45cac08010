"""How many workers one controller keeps busy: real study, sampler, pruner and checkpoints, and workers that only wait.

A worker's epoch is a sleep; its metrics are a formula of the config. Measured are the controller's CPU time per trial,
and the share of the time in which workers train: until the end, and until the first worker finds no trial left. MLflow
has a process of its own, and is left out.

    python benchmarks/scaling.py                                                  # an hour, which is spent asleep
    python benchmarks/scaling.py --workers 1 4 16 64 --trials 1248 --group-s 6    # CPU time at equal numbers of trials
"""

from __future__ import annotations

import argparse
import contextlib
import math
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.app.run_trials import Worker, run_trials
from pipeline.space.config import TrialConfig
from pipeline.space.load import space_from_document
from pipeline.space.placement import Placement, PlacementRules
from pipeline.space.trial import EpochMetrics
from pipeline.study.checkpoint import Checkpoints
from pipeline.study.store import Store

MAX_TRIALS = 5000
EPOCHS = 8
DOCUMENT: dict[str, Any] = {
    "workload": {"name": "digits", "model": "mlp"},
    "epochs": EPOCHS,
    "batch_size": 64,
    "objective": {"metric": "val/loss", "direction": "minimize"},
    "optimizer": {
        "sgd": {"base_lr": {"low": 1e-3, "high": 1.0, "log": True}, "momentum": {"choices": [0.0, 0.9]}},
        "adamw": {"base_lr": {"low": 1e-4, "high": 1e-1, "log": True}},
    },
    "scheduler": {"step": {"step_size": {"low": 1, "high": 4}, "gamma": {"low": 0.05, "high": 0.9, "log": True}}},
    "param_groups": {"all": {"pattern": "*"}},
}


class Sleeper:
    """Trains groups by waiting; the contract is `Executor`'s."""

    def __init__(self, group_s: float) -> None:
        self.rules = PlacementRules(device="cuda")
        self.epoch_s = group_s / EPOCHS
        self.trained_s = 0.0
        self.last_end = math.inf

    def build(self, configs: Mapping[int, TrialConfig], *, placement: Sequence[Placement] | None = None) -> Sleeping:
        """Return a group."""
        return Sleeping(self, configs)

    def adopt(self, rules: PlacementRules) -> None:
        """Place nothing."""

    def close(self) -> None:
        """Have nothing to close."""


class Sleeping:
    """A group that waits; the contract is `TrialGroup`'s."""

    def __init__(self, worker: Sleeper, configs: Mapping[int, TrialConfig]) -> None:
        self._worker, self._configs, self._epoch = worker, dict(configs), 0

    def train_epoch(self, *, average: bool = False) -> dict[int, EpochMetrics]:
        """Wait, and return metrics that follow from the configs."""
        began = time.monotonic()
        time.sleep(self._worker.epoch_s)
        self._epoch += 1
        self._worker.last_end = time.monotonic()
        self._worker.trained_s += self._worker.last_end - began
        return {number: self._metrics(config) for number, config in self._configs.items()}

    def _metrics(self, config: TrialConfig) -> EpochMetrics:
        loss = abs(math.log10(config.optimizer.base_lr) + 2) + 1 / self._epoch
        values = {"train/loss": loss, "val/loss": loss, "val/accuracy": 1 / (1 + loss)}
        averaged = {"val/loss": loss, "val/accuracy": 1 / (1 + loss)}
        place = Placement(trainer="plain", threads=1)
        return EpochMetrics(
            epoch=self._epoch, step=20 * self._epoch, metrics=values, lr={}, averaged=averaged, placement=place
        )

    def drop(self, number: int) -> None:
        """Train a trial no more."""
        self._configs.pop(number, None)

    def test(self) -> dict[int, dict[str, float]]:
        """Return nothing."""
        return {}

    def model_state(self, number: int) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def trial_states(self) -> Iterator[tuple[str, Any]]:
        """Return nothing."""
        return iter(())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Have no state."""


def main() -> int:
    """Run a search for each number of workers, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64], metavar="N")
    parser.add_argument("--trials-per-worker", type=int, default=78, metavar="N")
    parser.add_argument("--trials", type=int, metavar="N", help="the same number for each number of workers")
    parser.add_argument("--group-s", type=float, default=60.0, metavar="SECONDS", help="duration of a group")
    parser.add_argument("--sampler", default="tpe", metavar="NAME")
    options = parser.parse_args()
    print(
        "workers  trials  groups  wall s  busy to the end  while there are trials  controller's CPU per trial",
        flush=True,
    )
    for workers in options.workers:
        trials = options.trials or min(MAX_TRIALS, workers * options.trials_per_worker)
        with tempfile.TemporaryDirectory() as folder, contextlib.closing(Store(Path(folder))) as store:
            print(measured(store, workers, trials, options.group_s, options.sampler), flush=True)
    return 0


def measured(store: Store, workers: int, trials: int, group_s: float, sampler: str) -> str:
    """Run a search; return a row of the table."""
    space = space_from_document({**DOCUMENT, "sampler": {"name": sampler, "group_size": 64}}, name="scaling")
    crew = [Sleeper(group_s) for _ in range(workers)]
    study = store.create(space, name="scaling", trials=trials, rules=crew[0].rules)
    checkpoints = Checkpoints(store.folder("scaling") / "checkpoints", warn=print)
    began, cpu = time.monotonic(), time.process_time()
    run_trials(
        study,
        trials,
        [Worker(sleeper, lambda: {"device": "none"}) for sleeper in crew],
        checkpoints=checkpoints,
        told=(),
        interrupted=threading.Event().is_set,
    )
    wall, cpu = time.monotonic() - began, time.process_time() - cpu
    assert [trial.number for trial in study.ended] == list(range(trials))
    until = min(sleeper.last_end for sleeper in crew) - began
    trained = sum(sleeper.trained_s for sleeper in crew)
    after = sum(sleeper.last_end - began - until for sleeper in crew)  # an upper bound of what was trained later
    return (
        f"{workers:>7}  {trials:>6}  {len(study.groups):>6}  {wall:>6.1f}  {trained / (workers * wall):>15.1%}"
        f"  {(trained - after) / (workers * until):>22.1%}  {1000 * cpu / trials:>24.1f} ms"
    )


if __name__ == "__main__":
    raise SystemExit(main())
