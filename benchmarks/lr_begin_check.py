"""Check the rate to begin with of the range test against trainings at every rate.

Each model, optimizer and seed trains 20 epochs at every rate of the range test from 1e-4 on, at a constant rate, with a
cosine and with a step decay. A rule chooses a rate from the range test's curve alone. The excess is the validation loss
at the chosen rate over the lowest of all rates; the table says its geometric mean and its worst case, by rule:

    begin        `RateCurve.begin_with`: the middle of the rates that train well
    lowest       the rate of the lowest loss
    tenth        a tenth of the upper bound
    steepest     the rate at which the loss falls most steeply, per decade

    python benchmarks/lr_begin_check.py
    python benchmarks/lr_begin_check.py --models mlp --seeds 0
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the package need not be installed

from pipeline.app.prepare import prepare
from pipeline.app.range_test import PER_DECADE, RATES, RateCurve, range_test
from pipeline.space.load import space_from_document
from pipeline.space.search_space import SearchSpace
from pipeline.training.executor import LocalExecutor

TRIED = tuple(rate for rate in RATES if rate >= 1e-4)
MODELS: Mapping[str, dict[str, Any]] = {"mlp": {"model": "mlp", "train_samples": 600}, "cnn": {"model": "cnn"}}
OPTIMIZERS: Mapping[str, dict[str, Any]] = {
    "sgd": {"sgd": {}},
    "sgd with momentum": {"sgd": {"momentum": 0.9}},
    "adam": {"adam": {}},
    "adamw": {"adamw": {}},
    "rmsprop": {"rmsprop": {}},
}
SCHEDULES: Mapping[str, dict[str, Any]] = {"constant": {}, "cosine": {}, "step": {"step_size": 6, "gamma": 0.3}}


def main() -> None:
    """Check every model, optimizer and seed; print a line for each, and the excess of each rule."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=[*MODELS], default=[*MODELS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    excesses: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for model in options.models:
        for optimizer in OPTIMIZERS:
            for seed in options.seeds:
                rates, losses = check(model, optimizer, seed, options.device)
                for schedule, at in losses.items():
                    for rule, rate in rates.items():
                        loss = at.get(max(rate, TRIED[0]), math.inf)
                        excesses[model, schedule, rule].append(loss / min(at.values()))
                best = ", ".join(f"{min(at, key=at.__getitem__):g} {schedule}" for schedule, at in losses.items())
                print(f"{model} {optimizer} seed {seed}: begin with {rates['begin']:g}; best {best}", flush=True)
    for (model, schedule, rule), each in excesses.items():
        print(f"{model} {schedule:8} {rule:8} ×{statistics.geometric_mean(each):.2f}, worst ×{max(each):.1f}")


def check(model: str, optimizer: str, seed: int, device: str) -> tuple[dict[str, float], dict[str, dict[float, float]]]:
    """Return the rate of each rule, and by schedule the final validation loss at each rate that did not diverge."""
    space = space_of(model, optimizer, "constant", seed)
    _, executor = prepare(space, source=model, device=device, searching=True)
    (name,) = space.optimizers
    with contextlib.closing(executor):
        return chosen(range_test(space, name, executor)), final_losses(model, optimizer, seed, executor)


def chosen(curve: RateCurve) -> dict[str, float]:
    """Return the rate of each rule."""
    bounds, begin = curve.bounds(), curve.begin_with()
    assert bounds is not None
    assert begin is not None
    losses = [math.inf if loss is None else loss for loss in curve.losses]
    lowest = losses.index(min(losses))
    steepest = max(range(1, lowest + 1), key=lambda index: losses[index - 1] - losses[min(index + 1, lowest)])
    tenth = RATES[RATES.index(bounds.high) - PER_DECADE]
    return {"begin": begin, "lowest": RATES[lowest], "tenth": tenth, "steepest": RATES[steepest]}


def final_losses(model: str, optimizer: str, seed: int, executor: LocalExecutor) -> dict[str, dict[float, float]]:
    """Train at every rate with every schedule."""
    configs = {}
    for schedule in SCHEDULES:
        config = space_of(model, optimizer, schedule, seed).example()
        for rate in TRIED:
            strategy = dataclasses.replace(config.optimizer, base_lr=rate)
            configs[schedule, rate] = dataclasses.replace(config, optimizer=strategy)
    group = executor.build(dict(enumerate(configs.values())))
    last: dict[int, Any] = {}
    for _ in range(config.epochs):
        last |= group.train_epoch()
    losses: dict[str, dict[float, float]] = {schedule: {} for schedule in SCHEDULES}
    for number, (schedule, rate) in enumerate(configs):
        if last[number].finished:
            losses[schedule][rate] = last[number].metrics["val/loss"]
    return losses


def space_of(model: str, optimizer: str, schedule: str, seed: int) -> SearchSpace:
    """Return the space of one optimizer and one schedule, whose rate a training replaces."""
    ((name, hyperparameters),) = OPTIMIZERS[optimizer].items()
    document = {
        "workload": {"name": "digits", **MODELS[model]},
        "epochs": 20,
        "batch_size": 64,
        "seed": seed,
        "objective": {"metric": "val/loss", "direction": "minimize"},
        "optimizer": {name: {**hyperparameters, "base_lr": {"low": TRIED[0], "high": TRIED[-1], "log": True}}},
        "scheduler": {schedule: SCHEDULES[schedule]},
        "param_groups": {"all": {"pattern": "*"}},
    }
    return space_from_document(document, name="check")


if __name__ == "__main__":
    main()
