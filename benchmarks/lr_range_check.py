"""Check that the bounds of the range test contain the best rates of a random search.

For SGD and Adam, each model and each seed, the check compares the range test's proposal with a random search of 200
trials. The search has the other hyperparameters and the epochs of `frozen_digits.yaml`; base rates are drawn from 1e-5
to 10. The best rates have the highest validation accuracy after the last epoch, ties decided by validation loss. The
exit status is 1 if one of the five best rates lies outside the proposed bounds.

    python benchmarks/lr_range_check.py
    python benchmarks/lr_range_check.py --models mlp --seeds 0
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the package need not be installed

from pipeline.app.prepare import prepare
from pipeline.app.range_test import range_test
from pipeline.space.load import load_space, space_from_document
from pipeline.space.search_space import SearchSpace
from pipeline.training.executor import LocalExecutor

FROZEN = Path(__file__).resolve().parent / "frozen_digits.yaml"
WIDE_RANGE = {"low": 1e-5, "high": 10.0, "log": True}
ROWS = 25
BEST_RATES = 5
"""Rates that the bounds must contain."""


class RandomDraw:
    """A trial that chooses at random."""

    def __init__(self, generator: random.Random) -> None:
        self._random = generator

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """Choose a number; the default space has no steps."""
        if log:
            return math.exp(self._random.uniform(math.log(low), math.log(high)))
        return self._random.uniform(low, high)

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """Choose a whole number."""
        return self._random.randint(low, high)

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Choose one of `choices`."""
        return self._random.choice(choices)


def main() -> int:
    """Check every model and seed, print a line for each optimizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=["mlp", "cnn"], default=["mlp", "cnn"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    held = [
        check(model, optimizer, seed, options.trials, options.device)
        for model in options.models
        for seed in options.seeds
        for optimizer in ("sgd", "adam")
    ]
    print(f"{sum(held)} of {len(held)} proposals contain the best {BEST_RATES} rates")
    return 0 if all(held) else 1


def check(model: str, optimizer: str, seed: int, trials: int, device: str) -> bool:
    """Print a proposal and the best rates of a search; return whether the proposal contains them."""
    space = space_of(model, optimizer, seed)
    _, trainer = prepare(space, source="the frozen space", device=device, searching=True, rows=ROWS)
    start = time.perf_counter()
    bounds = range_test(space, optimizer, trainer).bounds()
    seconds = time.perf_counter() - start
    rates = best_rates(space, trainer, trials)
    inside = [bounds is not None and bounds.low <= rate <= bounds.high for rate in rates]
    words = f"{bounds.low:.1e} to {bounds.high:.1e}" if bounds else "nothing"
    print(f"{model} {optimizer:4} seed {seed}: {words} proposed after {seconds:.0f} s; best rates", end=" ")
    print(
        *(
            f"{rate:.1e}{'' if fine else ' (outside)'}"
            for rate, fine in list(zip(rates, inside, strict=True))[:BEST_RATES]
        ),
        end="; ",
    )
    print(f"of the best 10, {sum(inside[:10])} inside", flush=True)
    return all(inside[:BEST_RATES])


def space_of(model: str, optimizer: str, seed: int) -> SearchSpace:
    """Return the frozen space with one optimizer at a wide range of rates."""
    document = {**load_space(FROZEN).document}
    momentum = {"momentum": {"choices": [0.0, 0.9]}} if optimizer == "sgd" else {}
    document |= {"workload": {"name": "digits", "model": model}, "seed": seed}
    return space_from_document({**document, "optimizer": {optimizer: {"base_lr": WIDE_RANGE, **momentum}}}, name="wide")


def best_rates(space: SearchSpace, trainer: LocalExecutor, trials: int) -> list[float]:
    """Return the base rates of a random search's trials, best first, without diverged trials."""
    generator = random.Random(space.seed)
    configs = {number: space.sample(RandomDraw(generator)) for number in range(trials)}
    group = trainer.build(configs)
    for _ in range(space.epochs):
        last = group.train_epoch()
    finished = {number: epoch.metrics for number, epoch in last.items() if epoch.finished}
    order = sorted(finished, key=lambda n: (-finished[n]["val/accuracy"], finished[n]["val/loss"]))
    return [configs[number].optimizer.base_lr for number in order]


if __name__ == "__main__":
    sys.exit(main())
