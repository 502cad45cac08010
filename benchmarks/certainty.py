"""How often the intervals of `pipeline.study.certainty` are right, in simulated scores of five configs and three seeds.

Scores are the sum of a config's effect, a seed's effect and a normal residual. Effects and deviations are in standard
deviations of a residual. Configs 0 to 2 stand for finalists, 3 and 4 for baselines. The winner is the config with the
best mean, so it and what it is compared with are chosen by the scores of which the interval is made. Each line says in
what part of the repetitions the two were called not distinguishable, the interval held the true difference, and the
first was called better although it is not.

    python benchmarks/certainty.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the package need not be installed

from pipeline.study.certainty import compare

Pair = Callable[[npt.NDArray[np.float64]], tuple[int, int]]
"""Maps the means (config,) to the two configs that are compared."""
SEEDS = 3
SEED_DEVIATION = 2.0
BASELINES = (3, 4)
EQUAL, ONE_NOISY = (1.0,) * 5, (1.0, 1.0, 1.0, 1.0, 4.0)


def runner_up(means: npt.NDArray[np.float64]) -> tuple[int, int]:
    """Return the winner and the next."""
    second, first = np.argsort(means)[-2:]
    return int(first), int(second)


def better_baseline(means: npt.NDArray[np.float64]) -> tuple[int, int]:
    """Return the winner and the better of the baselines; of a winning baseline, the other."""
    first = int(means.argmax())
    return first, max((config for config in BASELINES if config != first), key=lambda config: float(means[config]))


CASES: Sequence[tuple[str, Sequence[float], Sequence[float], Pair]] = (
    ("two that are equal", (0, 0, 3, -1, 1), EQUAL, lambda _: (0, 1)),
    ("two that differ by 3", (0, 0, 3, -1, 1), EQUAL, lambda _: (2, 0)),
    ("winner and runner-up, all equal", (0, 0, 0, 0, 0), EQUAL, runner_up),
    ("winner and runner-up, two equally good, others worse by 9", (0, 0, -9, -9, -9), EQUAL, runner_up),
    ("winner and runner-up, each 1 better than the next", (2, 1, 0, -1, -2), EQUAL, runner_up),
    ("winner and better baseline, all equal", (0, 0, 0, 0, 0), EQUAL, better_baseline),
    ("winner and better baseline, baselines worse by 3", (0, 0, 0, -3, -3), EQUAL, better_baseline),
    ("two that are equal, a third config varies fourfold", (0, 0, 3, -1, 1), ONE_NOISY, lambda _: (0, 1)),
    ("two that differ by 3, a third config varies fourfold", (0, 0, 3, -1, 1), ONE_NOISY, lambda _: (2, 0)),
    ("two that are equal, of which one varies fourfold", (0, 0, 3, -1, 0), ONE_NOISY, lambda _: (0, 4)),
)


def main() -> None:
    """Print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5000)
    repetitions = parser.parse_args().repetitions
    print(f"{'compared':60} not distinguishable   true difference held   wrongly better   paired")
    for name, effects, deviations, pair in CASES:
        generator = np.random.default_rng(0)
        runs = generator.normal(size=(repetitions, len(effects), SEEDS)) * np.array(deviations)[:, None]
        runs += SEED_DEVIATION * generator.normal(size=(repetitions, 1, SEEDS)) + np.array(effects)[:, None]
        pairs = [pair(scores.mean(axis=1)) for scores in runs]
        found = [compare(scores, *two, direction="maximize") for scores, two in zip(runs, pairs, strict=True)]
        truths = [effects[first] - effects[second] for first, second in pairs]
        same = np.mean([not difference.distinguishable for difference in found])
        held = np.mean([d.low <= truth <= d.high for d, truth in zip(found, truths, strict=True)])
        wrong = np.mean([d.low > 0 >= truth for d, truth in zip(found, truths, strict=True)])
        single = np.mean([difference.method == "paired" for difference in found])
        print(f"{name:60} {same:19.1%} {held:22.1%} {wrong:16.1%} {single:8.1%}")


if __name__ == "__main__":
    main()
