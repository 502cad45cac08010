"""Whether the confirmed winner of a search is better than the first of its trials, on further seeds and test data.

Each search runs with another seed and is confirmed as its space says. Then its winner, its first trial and Adam at its
default rate train with further seeds. The test metric that belongs to the objective is averaged over these seeds. The
table has a line for each search, and says in the end how often the winner is at least as good as the first, and what
the worst of all searches delivers with and without confirmation.

    python benchmarks/confirmation.py
    python benchmarks/confirmation.py --space benchmarks/frozen_digits.yaml --searches 20
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the package need not be installed

from pipeline.app.prepare import prepare
from pipeline.app.result import SearchResult
from pipeline.search import search
from pipeline.space.config import TrialConfig
from pipeline.space.optimizers import Adam
from pipeline.space.schedules import Constant
from pipeline.training.executor import LocalExecutor

BETWEEN_SEARCHES = 1000
"""Distance of the seeds of two searches, so that no seed is used twice."""
FURTHER = 100
"""Distance of the first further seed from the seed of the search."""
WINNER, FIRST, ADAM = "winner", "first", "adam"


def main() -> None:
    """Run searches, print a line for each and the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", type=Path, default=Path("default"), help="search space (default: default)")
    parser.add_argument("--searches", type=int, default=20, metavar="N", help="(default: 20)")
    parser.add_argument("--seeds", type=int, default=20, metavar="N", help="further seeds per search (default: 20)")
    parser.add_argument("--trials", type=int, default=50, metavar="N", help="trials per search (default: 50)")
    options = parser.parse_args()
    delivered: list[Mapping[str, float]] = []
    for index in range(options.searches):
        seed = index * BETWEEN_SEARCHES
        with tempfile.TemporaryDirectory() as root:
            changes = {"seed": seed, "confirm.share": 0.33}  # the frozen space has no confirmation
            result = search(
                options.space, overrides=changes, trials=options.trials, root=root, device="cpu", quiet=True
            )
        if len(result.trials) < options.trials:  # interrupted
            break
        if not result.confirmed:
            print(f"seed {seed}: not confirmed", flush=True)
            continue
        delivered.append(means(result, range(seed + FURTHER, seed + FURTHER + options.seeds)))
        print(line(result, delivered[-1]), flush=True)
    summarize(delivered, lower_is_better=result.space.objective.direction == "minimize")


def means(result: SearchResult, seeds: range) -> dict[str, float]:
    """Return the mean test metric over seeds of the winner, the first and Adam; NaN if a run ended early."""
    _, executor = prepare(result.space, source="the space", device="cpu", searching=True)
    first = result.ranking[0].config
    groups = {name: dataclasses.replace(group, lr_ratio=1.0) for name, group in first.param_groups.items()}
    configs = {
        WINNER: result.confirmed[0].candidate.config,
        FIRST: first,
        ADAM: dataclasses.replace(first, optimizer=Adam(base_lr=1e-3), scheduler=Constant(), param_groups=groups),
    }
    runs = [tested(configs, seed, executor, metric=result.space.objective.metric) for seed in seeds]
    executor.close()
    return {name: statistics.fmean(run[name] for run in runs) for name in configs}


def tested(configs: Mapping[str, TrialConfig], seed: int, executor: LocalExecutor, *, metric: str) -> dict[str, float]:
    """Train configs with a seed; return the test metric of each."""
    group = executor.build({i: dataclasses.replace(c, seed=seed) for i, c in enumerate(configs.values())})
    for _ in range(next(iter(configs.values())).epochs):
        group.train_epoch()
    found = group.test()
    name = metric.replace("val/", "test/")
    return {config: found.get(i, {}).get(name, math.nan) for i, config in enumerate(configs)}


def line(result: SearchResult, found: Mapping[str, float]) -> str:
    """Return what one search delivers."""
    winner, first = result.confirmed[0], result.ranking[0]
    assert winner.mean is not None
    scores = f"its first had {first.value:.4f}, its winner {winner.candidate.label} has {winner.mean:.4f}"
    tests = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
    return f"seed {result.space.seed}: {scores}; test on further seeds: {tests}"


def summarize(delivered: list[Mapping[str, float]], *, lower_is_better: bool) -> None:
    """Print how often the winner is at least as good as the first, and the median and the worst of both."""
    sign = 1 if lower_is_better else -1
    as_good = sum(sign * found[WINNER] <= sign * found[FIRST] for found in delivered)
    print(f"\nthe winner is at least as good as the first in {as_good} of {len(delivered)} searches")
    for name in (WINNER, FIRST, ADAM):
        values = [found[name] for found in delivered]
        worst = max(values, key=lambda value: math.inf if math.isnan(value) else sign * value)
        print(f"{name:8} median {statistics.median(values):.4f}, worst {worst:.4f}")


if __name__ == "__main__":
    main()
