"""Check and train the jobs of `workloads.py`, and compare each with a loop written by hand.

    pip install transformers timm torchmetrics torch_geometric
    python benchmarks/jobs/run.py

For each job: rows or plain and why; whether the metrics of plain trials equal the loop's; and seconds per epoch of the
loop, of a plain trial, and of a trial among eight in a group as a search trains them. One thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import random
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import workloads
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pipeline.app.prepare import prepare
from pipeline.space.config import derive_seed
from pipeline.space.load import build_space
from pipeline.space.optimizers import AdamW
from pipeline.training.plain import PlainTrials
from pipeline.workloads.custom import check_form
from pipeline.workloads.data import epoch_order
from pipeline.workloads.workload import Workload

EPOCHS, BATCH, RATE, TRIALS = 3, 32, 1e-3, 8
SPACE: dict[str, Any] = {
    "workload": {"name": "own", "function": "workloads:job"},
    "epochs": EPOCHS,
    "batch_size": BATCH,
    "objective": {"metric": "val/loss", "direction": "minimize"},
    "optimizer": {"adamw": {"base_lr": {"choices": [RATE, 2 * RATE]}, "weight_decay": 0.01}},
    "scheduler": {"constant": {}},
    "param_groups": {"all": {"pattern": "*"}},
}


def main() -> None:
    """Print a line per job."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("jobs", nargs="*", help="names of functions of workloads.py; all if none is given")
    chosen = parser.parse_args().jobs
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    jobs = {name: value for name, value in vars(workloads).items() if _makes_workload(value)}
    print("| job | trains as | equal to the loop | loop, s/epoch | plain, s/epoch | of eight, s/epoch each |")
    print("|---|---|---|---|---|---|")
    for name, job in jobs.items():
        if not chosen or name in chosen:
            print(line(job), flush=True)


def line(job: Callable[[], Workload]) -> str:
    """Return a job's line of the table."""
    space = build_space(SPACE, source="space", name="space")
    workload = check_form(job(), job.__name__)
    space, executor = prepare(space, source="space", device="cpu", searching=True, workload=workload)
    assert isinstance(executor.workload, Workload)
    config = dataclasses.replace(space.example(), optimizer=AdamW(base_lr=RATE, weight_decay=0.01))
    by_hand, loop_s = trained_by_hand(job())
    plain, plain_s = trained(PlainTrials({0: config}, executor.workload, device=executor.device), 0)
    _, group_s = trained(executor.build(dict.fromkeys(range(TRIALS), config)), 0)
    executor.close()
    apart = max(abs(one[key] - other[key]) for one, other in zip(by_hand, plain, strict=True) for key in one)
    equal = "every digit" if apart == 0 else f"to {apart:.1g}"
    trains = f"plain: {executor.plain_because}" if executor.plain_because else "rows"
    return f"| {workload.name} | {trains} | {equal} | {loop_s:.3f} | {plain_s:.3f} | {group_s / TRIALS:.3f} |"


def trained(group: Any, number: int) -> tuple[list[Mapping[str, float]], float]:
    """Return a trial's losses of each epoch, and the seconds of the fastest epoch of its group."""
    history, seconds = [], []
    for _ in range(EPOCHS):
        begin = time.perf_counter()
        history.append(group.train_epoch()[number].metrics)
        seconds.append(time.perf_counter() - begin)
    return history, min(seconds)


def trained_by_hand(workload: Workload) -> tuple[list[dict[str, float]], float]:
    """Train a workload's data, model and loss by a plain loop over `DataLoader`s, with the same seeds and order."""
    seed_all("weights")
    model = workload.build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    train, val = as_dataset(workload.train), as_dataset(workload.val)
    val_loader = DataLoader(val, batch_size=len(workload.val), collate_fn=workload.collate)
    history, seconds = [], []
    for epoch in range(EPOCHS):
        begin, total = time.perf_counter(), 0.0
        order = epoch_order(workload, seed=0, epoch=epoch).split(BATCH)
        batches = [indices.tolist() for indices in order]
        model.train()
        for step, batch in enumerate(DataLoader(train, batch_sampler=batches, collate_fn=workload.collate)):
            seed_all("step", epoch, step)
            optimizer.zero_grad()
            loss = loss_of(workload, model, batch)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batches[step])
        model.eval()
        with torch.no_grad():
            (batch,) = val_loader
            seed_all("evaluation", epoch, 0)
            history.append({"train/loss": total / len(train), "val/loss": loss_of(workload, model, batch).item()})
        seconds.append(time.perf_counter() - begin)
    return history, min(seconds)


def loss_of(workload: Workload, model: nn.Module, batch: Any) -> torch.Tensor:
    """Return the loss of a batch, a dict or (inputs, targets)."""
    if isinstance(batch, Mapping):
        return workload.loss(model(**batch), batch)
    inputs, targets = batch
    return workload.loss(model(inputs), targets)


def as_dataset(split: Any) -> Any:
    """Return the samples of a split, as a `DataLoader` takes them."""
    return TensorDataset(split.inputs, split.targets) if hasattr(split, "inputs") else split


def seed_all(*purpose: str | int) -> None:
    """Seed every random state as the pipeline does for a purpose."""
    seed = derive_seed(0, *purpose)
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def _makes_workload(value: Any) -> bool:
    return inspect.isfunction(value) and value.__annotations__.get("return") == "Workload"


if __name__ == "__main__":
    main()
