"""What it costs that a sampler looks at some earlier trials only: loss found with the cap and without, seed by seed.

Both searches train the mlp of the digits and differ in nothing but the cap, so they are equal up to the trial at which
the cap begins to matter. Nothing is stored and MLflow is not told; proposals and training are those of a search.

    python benchmarks/sampler_cap.py --trials 1000 --seeds 10
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from optuna.trial import FrozenTrial, TrialState, create_trial

from pipeline.app.prepare import prepare
from pipeline.space.load import space_from_document
from pipeline.space.search_space import SearchSpace
from pipeline.study import samplers
from pipeline.study.study import group_size
from pipeline.training.executor import LocalExecutor

SPACE: dict[str, Any] = {
    "workload": {"name": "digits", "model": "mlp"},
    "epochs": 4,
    "batch_size": 64,
    "objective": {"metric": "val/loss", "direction": "minimize"},
    "optimizer": {
        "sgd": {"base_lr": {"low": 1e-3, "high": 1.0, "log": True}, "momentum": {"choices": [0.0, 0.9]}},
        "adamw": {
            "base_lr": {"low": 1e-4, "high": 1e-1, "log": True},
            "weight_decay": {"low": 1e-5, "high": 1e-1, "log": True},
        },
        "rmsprop": {"base_lr": {"low": 1e-5, "high": 1e-2, "log": True}},
    },
    "scheduler": {
        "step": {"step_size": {"low": 1, "high": 2}, "gamma": {"low": 0.05, "high": 0.9, "log": True}},
        "cosine": {"warmup": {"low": 0, "high": 2}},
    },
    "param_groups": {
        "head": {"pattern": "fc.*", "lr_ratio": {"low": 0.1, "high": 10, "log": True}},
        "body": {"pattern": "*"},
    },
    "pruner": {"name": "none"},
}
UNCAPPED = 10**9


def main() -> int:
    """Search with and without the cap for each seed; print the losses found and how they compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000, metavar="N", help="trials of a search (default: 1000)")
    parser.add_argument("--seeds", type=int, default=10, metavar="N", help="seeds, from 0 on (default: 10)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    caps = {"capped": (samplers.BEST, samplers.NEWEST), "uncapped": (UNCAPPED, 0)}
    ratios = []
    for seed in range(options.seeds):
        found = {}
        for name, (samplers.BEST, samplers.NEWEST) in caps.items():
            began = time.process_time()
            losses = sorted(search(seed, options.trials))
            found[name] = losses[0], statistics.median(losses[:25])
            print(f"seed {seed} {name}: best {losses[0]:.5f}, median of the best 25 {found[name][1]:.5f}", end="")
            print(f", {time.process_time() - began:.0f} s of CPU", flush=True)
        ratios.append([capped / uncapped for capped, uncapped in zip(*found.values(), strict=True)])
    for index, what in enumerate(("best", "median of the best 25")):
        values = [ratio[index] for ratio in ratios]
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
        better = sum(value < 1 for value in values)
        print(
            f"{what}: capped / uncapped {statistics.mean(values):.4f} ± {error:.4f}, lower in {better} of {len(values)}"
        )
    return 0


def search(seed: int, trials: int) -> Iterator[float]:
    """Yield the loss of each trial of a search that is complete."""
    space = space_from_document(SPACE | {"seed": seed}, name="cap")
    space, executor = prepare(space, source="cap", device="cpu", searching=True)
    size, earlier = group_size(space, executor.rules), list[FrozenTrial]()
    distributions = samplers.distributions(space)
    while len(earlier) < trials:
        first = len(earlier)
        proposals = samplers.propose(space, earlier, first=first, size=min(size, trials - first))
        values = train(executor, space, {number: config for number, (config, _) in proposals.items()})
        for number, (_, params) in proposals.items():
            value = values.get(number)
            trial = create_trial(
                state=TrialState.PRUNED if value is None else TrialState.COMPLETE,
                value=value,
                params=params,
                distributions={name: d for name, d in distributions.items() if name in params},
            )
            trial.number = number
            earlier.append(trial)
        yield from values.values()


def train(executor: LocalExecutor, space: SearchSpace, configs: dict[int, Any]) -> dict[int, float]:
    """Train a group; return the loss of each trial that did not diverge."""
    group, values = executor.build(configs), dict[int, float]()
    for _ in range(space.epochs):
        values = {}
        for number, epoch in group.train_epoch().items():
            if epoch.finished:
                values[number] = epoch.metrics["val/loss"]
            else:
                group.drop(number)
    return values


if __name__ == "__main__":
    sys.exit(main())
