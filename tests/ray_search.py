"""A search on Ray's workers, as a command runs it, without MLflow; as a script it kills itself."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.app.options import SearchOptions, read_search
from pipeline.app.prepare import prepare
from pipeline.app.run_trials import run_trials
from pipeline.app.workers import workers_of
from pipeline.space.trial import BegunTrial, EndedTrial, EpochMetrics
from pipeline.study.checkpoint import Checkpoints
from pipeline.study.store import Store
from pipeline.study.study import Study
from pipeline.training.executor import LocalExecutor
from pipeline.training.ray_worker import RayWorker

TASK = """
import os

import torch
from torch import nn
from torch.nn import functional as F

from pipeline.training import executor
from pipeline.workloads.workload import Metric, Split, Workload, accuracy
from sizes import HIDDEN


def task() -> Workload:
    if "FREE_BYTES" in os.environ:  # of an emulated node
        executor.free_memory = lambda device: int(os.environ["FREE_BYTES"])
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(57, 6, generator=generator)
    targets = (inputs @ torch.randn(6, 3, generator=generator)).argmax(dim=1)
    return Workload(
        name="task",
        build_model=lambda: nn.Sequential(nn.Linear(6, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 3)),
        train=Split(inputs[:37], targets[:37]),
        val=Split(inputs[37:], targets[37:]),
        loss=F.cross_entropy,
        metrics={"accuracy": Metric(accuracy, "maximize")},
    )
"""
DOCUMENT: dict[str, Any] = {
    "workload": {"name": "own", "function": "code/task.py:task"},
    "epochs": 6,
    "batch_size": 8,
    "objective": {"metric": "val/loss", "direction": "minimize"},
    "optimizer": {"sgd": {"base_lr": {"low": 1e-2, "high": 0.5, "log": True}}},
    "scheduler": {"exponential": {"gamma": {"low": 0.5, "high": 0.9}}},
    "param_groups": {"all": {"pattern": "*"}},
    "pruner": {"name": "median", "n_startup_trials": 4, "n_warmup_epochs": 2},
    "sampler": {"name": "tpe", "n_startup_trials": 4, "group_size": 4},
}


def write_task(root: Path) -> None:
    """Write the task, and a file that it imports, below a folder."""
    (root / "code").mkdir(parents=True)
    (root / "code" / "task.py").write_text(TASK)
    (root / "code" / "sizes.py").write_text("HIDDEN = 8\n")


class Watch:
    """Calls a function after each epoch of a group with the number of such epochs so far."""

    def __init__(self, after: Callable[[int], None]) -> None:
        self.after, self.epochs = after, 0
        self.ended: list[int] = []

    def begin(self, trial: BegunTrial) -> None:
        """Take a trial."""

    def epoch(self, metrics: Mapping[int, EpochMetrics]) -> None:
        self.epochs += 1
        self.after(self.epochs)

    def end(self, trial: EndedTrial) -> None:
        self.ended.append(trial.number)


def options_of(root: Path, **options: Any) -> SearchOptions:
    given = {"trials": 16, "timeout": None, "study": "mine", "root": root, "device": "auto", "rows": None, **options}
    return read_search(space=DOCUMENT, workload=None, overrides={}, changed_code=False, from_python=True, **given)


def search(
    root: Path, after_epoch: Callable[[int, list[RayWorker]], None] = lambda epoch, workers: None, **options: Any
) -> tuple[Study, LocalExecutor, list[str]]:
    """Search, or go on; return the study, an executor of this process, and the warnings."""
    found, warnings = options_of(root, **options), list[str]()
    space, executor = prepare(found.space, source="test", device="cpu", searching=True)
    store = Store(root)
    with workers_of(found, executor) as workers:
        remote = [worker.executor for worker in workers if isinstance(worker.executor, RayWorker)]
        for worker in remote:
            worker.place()  # else the first one may have trained everything before the others have started
        exists = any(header.name == "mine" for header in store.headers())
        rules = workers[0].executor.rules
        study = store.open("mine") if exists else store.create(space, name="mine", trials=found.trials, rules=rules)
        run_trials(
            study,
            found.trials,
            workers,
            checkpoints=Checkpoints(store.folder("mine") / "checkpoints", warn=warnings.append, share=1),
            told=[Watch(lambda epoch: after_epoch(epoch, remote))],
            interrupted=lambda: False,
        )
    store.close()
    return study, executor, warnings


if __name__ == "__main__":

    def kill(epoch: int, workers: list[RayWorker]) -> None:
        if epoch == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    search(Path.cwd(), kill, ray=sys.argv[1], workers=2)
