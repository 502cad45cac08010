"""Does a search find less when several workers train at once, at equal numbers of trials?

Groups train side by side as with `--workers`: a free worker takes a group, proposed from what the study knows by then,
and trials are judged as their epochs end. Time is simulated: each worker has its own pace, so that workers do not end
together. What a search has found is the objective of its best trial. What is lost is a share of what TPE with one
worker gains over random trials with the same pruner; intervals, 95 %, are bootstrapped over searches in pairs.
Tasks and training are those of `search_quality.py`.

    python benchmarks/parallel_quality.py --task mlp/sched --searches 20
"""

from __future__ import annotations

import argparse
import dataclasses
import heapq
import math
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from search_quality import (
    NOW,
    TASKS,
    TRAINING_SEEDS,
    Found,
    Histories,
    Request,
    Search,
    Task,
    ended,
    in_processes,
    new_study,
    run_searches,
    training_seed_of,
)

from pipeline.space.config import TrialConfig
from pipeline.space.search_space import Sampler, SearchSpace
from pipeline.space.trial import BegunTrial, EndedTrial, TrialState

GROUP = 8
SLOWEST = 1.5
"""Most time that a worker takes for an epoch; the fastest takes 1."""


@dataclass
class Training:
    """A group that a worker trains."""

    proposals: Mapping[int, tuple[TrialConfig, dict[str, Any]]]
    histories: Histories
    running: set[int]
    epoch: int = 0

    def train_epoch(self, study: Any) -> list[EndedTrial]:
        """Reveal an epoch to the study; return the trials that end with it."""
        self.epoch += 1
        epochs = {number: self.histories[number][: self.epoch] for number in self.running}
        study.epoch({number: history[-1] for number, history in epochs.items()})
        over = {n for n, history in epochs.items() if self.epoch == study.space.epochs or not history[-1].finished}
        if judged := {n: history for n, history in epochs.items() if n not in over}:
            over |= study.stops(self.epoch, judged)
        self.running -= over
        return [ended(n, *self.proposals[n], epochs[n], study.space) for n in sorted(over)]


def beside(space: SearchSpace, trials: int, *, workers: int) -> Search:
    """Search with several workers."""
    study = new_study(space, trials, group=GROUP)
    pace = [random.Random(f"{space.seed} {worker}").uniform(1, SLOWEST) for worker in range(workers)]
    training: dict[int, Training] = {}
    events = [(0.0, worker) for worker in range(workers)]
    while events:
        now, worker = heapq.heappop(events)
        if worker not in training:
            if not (proposals := study.take_group(trials, workers=workers)):
                continue
            configs = {number: config for number, (config, _) in proposals.items()}
            histories = yield Request(configs, lambda _epoch, _running: set(), study.averages)
            for number, config in configs.items():
                study.begin(BegunTrial(number=number, config=config, started=0.0, epochs=()))
            training[worker] = Training(proposals, histories, set(proposals))
        else:
            over = training[worker].train_epoch(study)
            for trial in over:
                study.end(trial)
            study.add_in_order(*over)
            if not training[worker].running:
                del training[worker]
                heapq.heappush(events, (now, worker))
                continue
        heapq.heappush(events, (now + pace[worker], worker))
    return study.ended


VARIANTS: Mapping[str, tuple[int, Sampler | None]] = {
    "random": (1, Sampler(name="random")),
    "1 worker": (1, None),
    "4 workers": (4, None),
    "16 workers": (16, None),
}
"""Name to the number of workers, and a sampler in place of TPE."""


def searched(call: tuple[str, list[int], int, int]) -> list[Found]:
    """Run every variant with every seed of the sampler, all with one training seed."""
    task, seeds, training_seed, trials = call
    searches = {}
    for name, (workers, sampler) in VARIANTS.items():
        for seed in seeds:
            space = TASKS[task].space(seed, NOW)
            space = dataclasses.replace(space, sampler=sampler or space.sampler)
            searches[name, seed] = beside(space, trials, workers=workers)
    return run_searches(TASKS[task].build(), searches, training_seed=training_seed)


def best(found: Found, task: Task) -> float:
    """Return the objective of the best trial, smaller is better."""
    objective = task.space(0).objective
    return min(objective.score(trial.epochs)[0] for trial in found.trials if trial.state is TrialState.COMPLETE)


def compare(task: str, searches: int, trials: int, processes: int) -> None:
    """Print what each variant finds, and what is lost of the sampler's gain."""
    began = time.perf_counter()
    calls = [
        (task, [seed for seed in range(searches) if training_seed_of(seed) == first], first, trials)
        for first in TRAINING_SEEDS
    ]
    found = {(f.variant, f.seed): f for part in in_processes(searched, calls, processes) for f in part}
    values = {name: [best(found[name, seed], TASKS[task]) for seed in range(searches)] for name in VARIANTS}
    print(f"# {task}: {searches} searches of {trials} trials, {time.perf_counter() - began:.0f} s")
    print("variant      epochs  mean best  median   worst   lost of the gain of 1 worker over random")
    for name, bests in values.items():
        epochs = statistics.fmean(sum(len(t.epochs) for t in found[name, seed].trials) for seed in range(searches))
        line = (
            f"{name:11} {epochs:7.0f}  {statistics.fmean(bests):9.4f}  {statistics.median(bests):.4f}  {max(bests):.4f}"
        )
        print(line, "" if name == "1 worker" else f" {lost(bests, values['1 worker'], values['random'])}", flush=True)


def lost(bests: Sequence[float], alone: Sequence[float], by_chance: Sequence[float]) -> str:
    """Return in percent what is lost of the gain over random trials, with its interval."""
    draw = random.Random(0)
    triples = list(zip(bests, alone, by_chance, strict=True))

    def share(drawn: Sequence[tuple[float, float, float]]) -> float:
        mine, one, chance = (statistics.fmean(column) for column in zip(*drawn, strict=True))
        return 100 * (mine - one) / (chance - one) if chance > one else math.inf

    shares = sorted(share(draw.choices(triples, k=len(triples))) for _ in range(2000))
    return f"{share(triples):.0f} % [{shares[50]:.0f} {shares[1949]:.0f}]"


def main() -> None:
    """Compare the variants."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="mlp/sched", help="(default: mlp/sched)")
    parser.add_argument("--searches", type=int, default=20, metavar="N", help="of each variant (default: 20)")
    parser.add_argument("--trials", type=int, default=100, metavar="N", help="of each search (default: 100)")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="(default: 2)")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    compare(options.task, options.searches, options.trials, options.processes)


if __name__ == "__main__":
    main()
