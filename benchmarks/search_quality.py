"""What a search delivers: the test loss, with fresh seeds, of its config, against all epochs that it trained.

Each task has a workload and a search space. Searches differ in the seed of their sampler; each of four training seeds
serves a quarter of them. A search delivers either its first, the trial with the best score, or its winner: finalists
and baselines train with fresh seeds, as `pipeline.confirm` has them train, and the best mean wins. What is delivered
trains with ten further seeds, and the median of their test metric is its loss. All searches train at the same time as
rows of common matrices. Proposals, verdicts, finalists and confirmations are those of the package; nothing is stored.

Peers are Optuna's defaults, one trial at a time: TPE with MedianPruner, TPE with HyperbandPruner; and random trials.
`now` is the package as it is, `before` as it was until 2026-11-26: groups of 13, rungs 4, 8 and 16, last weights.
The table has several numbers of trials, so that searches can be compared at as many epochs; an interval is of the mean
difference in percent, 95 %, bootstrapped over searches in pairs. `--pruning` measures which of 50 random trials
the rules stop, by kind of schedule.

    python benchmarks/search_quality.py --task showpiece
    python benchmarks/search_quality.py --pruning
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import multiprocessing
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the package need not be installed

import optuna
import torch
from torch import nn

from pipeline.files.strict_yaml import loads
from pipeline.space.config import TrialConfig
from pipeline.space.confirm import Confirm
from pipeline.space.load import space_from_document
from pipeline.space.placement import PlacementRules
from pipeline.space.pruners import Median, NoPruner, Pruner, Score, SuccessiveHalving
from pipeline.space.schedules import Step
from pipeline.space.search_space import Sampler, SearchSpace
from pipeline.space.trial import EndedTrial, EpochMetrics, TrialState
from pipeline.study.candidates import plan
from pipeline.study.samplers import propose
from pipeline.study.study import HEADER, Study
from pipeline.training.rows.trainer import FusedTrials
from pipeline.workloads.digits import DigitsMLP, digits
from pipeline.workloads.workload import Split, Workload

CPU = torch.device("cpu")
TRAINING_SEEDS = (0, 1000, 2000, 3000)
CONFIRM_SEEDS = 3
TEST_SEEDS = range(900_000, 900_010)
REFERENCE = "optuna"
OPTIMIZERS = """
optimizer:
  sgd:     {base_lr: {low: 1e-3, high: 1.0, log: true}, momentum: {choices: [0.0, 0.9]}}
  adamw:   {base_lr: {low: 1e-4, high: 1e-1, log: true}, weight_decay: {low: 1e-5, high: 1e-1, log: true}}
  rmsprop: {base_lr: {low: 1e-5, high: 1e-2, log: true}}
"""
STEPS = """
scheduler:
  step: {step_size: {low: 10%, high: 50%}, gamma: {low: 0.05, high: 0.9, log: true}}
param_groups:
  head: {pattern: "fc.*", lr_ratio: {low: 0.1, high: 10, log: true}}
  body: {pattern: "*"}
"""
SCHEDULES = """
scheduler:
  constant: {}
  step: {step_size: {low: 2, high: 18}, gamma: {low: 0.05, high: 0.9, log: true}}
  cosine: {}
  onecycle: {}
  exponential: {gamma: {low: 0.7, high: 1.0}}
param_groups:
  all: {pattern: "*"}
"""
MLP = "workload: {name: digits, model: mlp}\nobjective: {metric: val/loss, direction: minimize}"
LENGTH = "\nepochs: 20\nbatch_size: 64\n"


class NarrowMLP(DigitsMLP):
    """The digits mlp with 32 units in a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden1, self.hidden2, self.fc = nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, 10)


def hard() -> Workload:
    """Return 400 images to train on, of which a tenth have random labels; the others not used to validate test."""
    full = digits("mlp")
    train, test = full.train, full.test
    assert isinstance(train, Split)
    assert isinstance(test, Split)
    inputs, targets = train.inputs[:400], train.targets[:400].clone()
    targets[:40] = torch.randint(10, (40,), generator=torch.Generator().manual_seed(0))
    rest = Split(torch.cat([test.inputs, train.inputs[400:]]), torch.cat([test.targets, train.targets[400:]]))
    changes = {"build_model": NarrowMLP, "train": Split(inputs, targets), "test": rest}
    return Workload(**{**vars(full), **changes})


@dataclass(frozen=True)
class Task:
    """What is searched."""

    build: Callable[[], Workload]
    text: str
    """The search space."""

    def space(self, seed: int, pruner: Pruner | None = None) -> SearchSpace:
        """Return the space with a seed, and perhaps another pruner."""
        space = space_from_document({**loads(self.text, source="task"), "seed": seed}, name="quality")
        return space if pruner is None else dataclasses.replace(space, pruner=pruner)


def _file(*parts: str) -> str:
    return Path(__file__).resolve().parent.parent.joinpath(*parts).read_text()


TASKS = {
    "hard/default": Task(hard, MLP + LENGTH + OPTIMIZERS + STEPS),
    "hard/sched": Task(hard, MLP + LENGTH + OPTIMIZERS + SCHEDULES),
    "mlp/sched": Task(lambda: digits("mlp"), MLP + LENGTH + OPTIMIZERS + SCHEDULES),
    "showpiece": Task(lambda: digits("mlp", train_samples=600), _file("search_spaces", "default.yaml")),
    "cnn": Task(lambda: digits("cnn"), _file("benchmarks", "frozen_digits.yaml")),
}

Histories = dict[int, list[EpochMetrics]]
Run = tuple[Score, float] | None
"""Score after the last epoch, and test loss; None: diverged."""


@dataclass(frozen=True)
class Request:
    """Trials that train from the beginning, with what stops them."""

    configs: Mapping[int, TrialConfig]
    stops: Callable[[int, Histories], set[int]]
    averages: Callable[[int], bool] = lambda _: False


Search = Generator[Request, Histories, list[EndedTrial]]


class InMemory:
    """Takes the place of a study's database."""

    def __init__(self) -> None:
        self._storage = optuna.storages.InMemoryStorage()

    def storage(self) -> optuna.storages.InMemoryStorage:
        """Return Optuna's storage."""
        return self._storage

    def attempt(self, action: Callable[[], Any]) -> Any:
        """Return what an action returns."""
        return action()

    def write(self, doing: str, action: Callable[[], Any], *, arrived: object = None) -> None:
        """Call an action."""
        action()

    def add_trials(self, study: str, trials: Sequence[optuna.trial.FrozenTrial]) -> None:
        """Add ended trials."""
        optuna.load_study(study_name=study, storage=self._storage).add_trials(trials)


def new_study(space: SearchSpace, trials: int, *, group: int) -> Study:
    """Return a study that nothing stores."""
    memory: Any = InMemory()
    stored = optuna.create_study(storage=memory.storage(), study_name="ours", direction=space.objective.direction)
    stored.set_user_attr(HEADER, {"placement": PlacementRules(device="cpu").to_dict()})
    return Study(space, name="ours", identity="", planned=trials, group_size=group, database=memory)


def ours(space: SearchSpace, trials: int, *, group: int) -> Search:
    """Search as the package does, in groups of a size."""
    study = new_study(space, trials, group=group)
    while proposals := study.next_group(trials):
        histories = yield Request({n: c for n, (c, _) in proposals.items()}, study.stops, study.averages)
        for number, (config, params) in proposals.items():
            study.add(ended(number, config, params, histories[number], space))
    return study.ended


def optunas(space: SearchSpace, trials: int, *, pruner: optuna.pruners.BasePruner) -> Search:
    """Search as Optuna does by default: one trial at a time, TPE."""
    objective = space.objective
    study = optuna.create_study(
        direction=objective.direction, sampler=optuna.samplers.TPESampler(seed=space.seed), pruner=pruner
    )
    found = []
    for number in range(trials):
        trial = study.ask()
        config = space.sample(trial)

        def stops(epoch: int, running: Histories, trial: optuna.Trial = trial) -> set[int]:
            trial.report(objective.value(running[trial.number]), epoch)
            return {trial.number} if trial.should_prune() else set()

        histories = yield Request({number: config}, stops)
        found.append(ended(number, config, trial.params, histories[number], space))
        state = optuna.trial.TrialState
        if found[-1].state is TrialState.COMPLETE:
            study.tell(trial, found[-1].value)
        else:
            study.tell(trial, state=state.PRUNED)
    return found


def ended(
    number: int, config: TrialConfig, params: Mapping[str, Any], epochs: Sequence[EpochMetrics], space: SearchSpace
) -> EndedTrial:
    """Return the record of a trial."""
    state, objective = TrialState.PRUNED, space.objective
    if not epochs[-1].finished:
        state = TrialState.DIVERGED
    elif len(epochs) == space.epochs:
        state = TrialState.COMPLETE
    return EndedTrial(
        number=number,
        config=config,
        params=params,
        state=state,
        objective=objective,
        reason=None,
        value=objective.value(epochs) if state is TrialState.COMPLETE else None,
        epochs=tuple(epochs),
        started=0.0,
        ended=0.0,
        environment={"placement": []},
    )


@dataclass(frozen=True)
class Variant:
    """A way to search."""

    shown: tuple[int, ...]
    """Numbers of trials after which the table shows what is delivered, the last of which ends the search."""
    search: Callable[[SearchSpace, int], Search]
    pruner: Pruner | None = None
    """Takes the place of the space's."""
    sampler: Sampler | None = None
    """The same."""


def _ours(*shown: int, group: int, pruner: Pruner, sampler: Sampler | None = None) -> Variant:
    return Variant(shown, lambda space, count: ours(space, count, group=group), pruner, sampler)


def _optunas(*shown: int, pruner: Callable[[], optuna.pruners.BasePruner]) -> Variant:
    return Variant(shown, lambda space, count: optunas(space, count, pruner=pruner()))


BEFORE = SuccessiveHalving(min_resource=4, max_resource=20, averaged=False)
NOW = SuccessiveHalving(min_resource=3, max_resource=10)
VARIANTS = {
    REFERENCE: _optunas(50, 70, pruner=optuna.pruners.MedianPruner),
    "hyperband": _optunas(50, pruner=optuna.pruners.HyperbandPruner),
    "random": _ours(50, group=50, pruner=NoPruner(), sampler=Sampler(name="random")),
    "before": _ours(50, group=13, pruner=BEFORE),
    "now": _ours(30, 40, 50, group=8, pruner=NOW),
    "now, 13": _ours(50, group=13, pruner=NOW),
}


@dataclass(frozen=True)
class Found:
    """The trials of one search."""

    variant: str
    seed: int
    trials: list[EndedTrial]


def search_all(task: Task, variants: Sequence[str], seeds: Sequence[int], training_seed: int) -> list[Found]:
    """Run every variant with every seed of the sampler, all with one training seed."""
    workload = task.build()
    running: dict[tuple[str, int], Search] = {}
    for name in variants:
        for seed in seeds:
            variant = VARIANTS[name]
            space = task.space(seed, variant.pruner)
            space = dataclasses.replace(space, sampler=variant.sampler or space.sampler)
            running[name, seed] = variant.search(space, variant.shown[-1])
    return run_searches(workload, running, training_seed=training_seed)


def run_searches(workload: Workload, searches: Mapping[tuple[str, int], Search], *, training_seed: int) -> list[Found]:
    """Run searches, by variant and seed; what they ask for at a time trains as rows of one matrix."""
    running = dict(searches)
    found = []
    answers: dict[tuple[str, int], Histories | None] = dict.fromkeys(running)
    while running:
        requests = {}
        for key, search in list(running.items()):
            try:
                requests[key] = search.send(answers[key])  # type: ignore[arg-type]
            except StopIteration as stop:
                found.append(Found(*key, stop.value))
                del running[key]
        answers = dict(train(workload, requests, seed=training_seed))
    return found


def train(
    workload: Workload, requests: Mapping[Any, Request], *, seed: int, test: bool = False
) -> dict[Any, Histories]:
    """Train the trials of several requests as rows of one matrix; return the epochs of each."""
    rows = [(key, number) for key, request in requests.items() for number in request.configs]
    if not rows:
        return {}
    configs = {i: dataclasses.replace(requests[k].configs[n], seed=seed) for i, (k, n) in enumerate(rows)}
    group = FusedTrials(configs, workload, device=CPU)
    histories: dict[Any, Histories] = {key: {number: [] for number in r.configs} for key, r in requests.items()}
    epochs = next(iter(configs.values())).epochs
    for epoch in range(1, epochs + 1):
        asking = {key for key, request in requests.items() if request.averages(epoch)}
        results = group.train_epoch(average=bool(asking))
        running: dict[Any, Histories] = defaultdict(dict)
        for row, metrics in results.items():
            key, number = rows[row]
            kept = metrics if key in asking else dataclasses.replace(metrics, averaged={})
            histories[key][number].append(dataclasses.replace(kept, lr={}, placement=None))
            if metrics.finished:
                running[key][number] = histories[key][number]
        for key, judged in running.items() if epoch < epochs else ():
            for number in requests[key].stops(epoch, judged):
                group.drop(rows.index((key, number)))
    if test:
        for row, scores in group.test().items():
            key, number = rows[row]
            last = histories[key][number][-1]
            histories[key][number].append(dataclasses.replace(last, metrics=scores))
    return histories


def measured(task: Task, keys: Sequence[str], seed: int) -> dict[str, Run]:
    """Train configs with a seed."""
    objective = task.space(0).objective
    configs = {n: TrialConfig.from_dict(json.loads(key)) for n, key in enumerate(keys)}
    histories = train(task.build(), {0: Request(configs, lambda _epoch, _running: set())}, seed=seed, test=True)[0]
    found: dict[str, Run] = {}
    for number, key in enumerate(keys):
        *epochs, tested = histories[number]
        if not tested.finished or "test/loss" not in tested.metrics:
            found[key] = None
            continue
        value = tested.metrics[objective.metric.replace("val/", "test/")]
        found[key] = objective.score(epochs), 1 - value if objective.direction == "maximize" else value
    return found


@dataclass(frozen=True)
class Delivered:
    """What one search has to show after some of its trials."""

    searched: float
    """Epochs of the search."""
    confirmed: float
    """Epochs of the confirmation."""
    first: str
    """A config, as `key_of` returns it."""
    candidates: tuple[str, ...]
    confirm_seeds: tuple[int, ...]


def delivered(found: Found, trials: int, task: Task) -> Delivered | None:
    """Return what a search has to show after a number of trials; None if none is complete."""
    space = task.space(found.seed)
    known = found.trials[:trials]
    complete = sorted((t for t in known if t.state is TrialState.COMPLETE), key=space.objective.order)
    if not complete:
        return None
    study: Any = SimpleNamespace(ended=known, space=space, best=lambda count: complete[:count])
    planned = plan(study, Confirm(share=1, baselines=True, seeds=CONFIRM_SEEDS))
    # The baseline of SGD does not fit into a third of the epochs; Adam's does.
    candidates = tuple(c.config for c in planned.candidates if c.label != "SGD with StepLR")
    first = training_seed_of(found.seed)
    return Delivered(
        searched=sum(len(trial.epochs) for trial in known),
        confirmed=len(candidates) * CONFIRM_SEEDS * space.epochs,
        first=key_of(complete[0].config),
        candidates=tuple(map(key_of, candidates)),
        confirm_seeds=tuple(range(first + 1, first + 1 + CONFIRM_SEEDS)),
    )


def training_seed_of(seed: int) -> int:
    """Return the training seed of a search."""
    return TRAINING_SEEDS[seed % len(TRAINING_SEEDS)]


def key_of(config: TrialConfig) -> str:
    """Return a config as text, without the seed of its search, so that equal configs are trained once."""
    return json.dumps(dataclasses.replace(config, seed=0).to_dict())


class Losses:
    """Losses of configs with seeds, each trained once."""

    def __init__(self, task: str, processes: int) -> None:
        self._task, self._processes = task, processes
        self._known: dict[int, dict[str, Run]] = defaultdict(dict)

    def train(self, wanted: Iterable[tuple[str, int]]) -> None:
        """Train what is not known yet."""
        missing: dict[int, dict[str, None]] = defaultdict(dict)
        for config, seed in wanted:
            if config not in self._known[seed]:
                missing[seed][config] = None
        calls = [(self._task, list(configs), seed) for seed, configs in missing.items()]
        for (_, _, seed), found in zip(calls, in_processes(_measured, calls, self._processes), strict=True):
            self._known[seed] |= found

    def winner(self, shown: Delivered) -> str:
        """Return the candidate with the best mean score over the seeds of the confirmation."""
        scores = {}
        for config in shown.candidates:
            runs = [self._known[seed][config] for seed in shown.confirm_seeds]
            if all(run is not None for run in runs):
                parts = zip(*(run[0] for run in runs if run is not None), strict=True)
                scores[config] = tuple(statistics.fmean(part) for part in parts)
        return min(scores, key=lambda config: scores[config], default=shown.first)

    def test(self, config: str) -> float:
        """Return the median test loss over the further seeds: of a config that fails with one of ten, of the others."""
        runs = [self._known[seed][config] for seed in TEST_SEEDS]
        return statistics.median(math.inf if run is None else run[1] for run in runs)


def _measured(call: tuple[str, list[str], int]) -> dict[str, Run]:
    task, configs, seed = call
    return measured(TASKS[task], configs, seed)


def _searched(call: tuple[str, list[str], list[int], int]) -> list[Found]:
    task, variants, seeds, training_seed = call
    return search_all(TASKS[task], variants, seeds, training_seed)


def in_processes(function: Callable[[Any], Any], calls: Sequence[Any], processes: int) -> list[Any]:
    """Call a function with each of several arguments, in as many processes."""
    torch.set_num_threads(1)
    if processes == 1 or not calls:
        return list(map(function, calls))
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        return pool.map(function, calls, chunksize=1)


def compare(task: str, variants: Sequence[str], searches: int, processes: int) -> None:
    """Print what each variant delivers on a task, and how it differs from the reference at as many epochs."""
    began = time.perf_counter()
    calls = [
        (task, list(variants), [seed for seed in range(searches) if training_seed_of(seed) == training], training)
        for training in TRAINING_SEEDS
    ]
    found = {(f.variant, f.seed): f for part in in_processes(_searched, calls, processes) for f in part}
    print(f"# {task}: {searches} searches, {time.perf_counter() - began:.0f} s", flush=True)
    shown = {
        (name, count, seed): one
        for name in variants
        for count in VARIANTS[name].shown
        for seed in range(searches)
        if (one := delivered(found[name, seed], count, TASKS[task])) is not None
    }
    losses = Losses(task, processes)
    losses.train((c, seed) for one in shown.values() for c in one.candidates for seed in one.confirm_seeds)
    chosen = {key: (one.first, losses.winner(one)) for key, one in shown.items()}
    losses.train((config, seed) for pair in chosen.values() for config in pair for seed in TEST_SEEDS)
    tests = {key: tuple(map(losses.test, pair)) for key, pair in chosen.items()}
    print(f"# trained in {time.perf_counter() - began:.0f} s", flush=True)
    _print_table(variants, shown, tests, searches)


def _print_table(
    variants: Sequence[str],
    shown: Mapping[tuple[str, int, int], Delivered],
    tests: Mapping[tuple[str, int, int], tuple[float, ...]],
    searches: int,
) -> None:
    print("variant     trials  searched  with confirmation   first: median worst   winner: median worst", end="")
    print(f"   winner to {REFERENCE}'s first, to its winner, first to its first, in %")
    for name in variants:
        for count in VARIANTS[name].shown:
            keys = [(name, count, seed) for seed in range(searches) if (name, count, seed) in shown]
            searched = statistics.fmean(shown[key].searched for key in keys)
            total = statistics.fmean(shown[key].searched + shown[key].confirmed for key in keys)
            line = f"{name:12}{count:5}{searched:10.0f}{total:12.0f}          "
            for kind in (0, 1):
                values = [tests[key][kind] for key in keys]
                line += f"{statistics.median(values):10.4f} {max(values):.4f}      "
            for mine, theirs in ((1, 0), (1, 1), (0, 0)):
                pairs = [(tests[key][mine], tests[REFERENCE, 50, key[2]][theirs]) for key in keys]
                line += f"  {difference(pairs)}"
            print(line, flush=True)


def difference(pairs: Sequence[tuple[float, float]]) -> str:
    """Return the mean difference of pairs in percent and its 95 % interval, bootstrapped."""
    logs = [math.log(mine / theirs) for mine, theirs in pairs]
    draw = random.Random(0)
    means = sorted(statistics.fmean(draw.choices(logs, k=len(logs))) for _ in range(2000))
    low, middle, high = (100 * math.expm1(value) for value in (means[50], statistics.fmean(logs), means[1949]))
    return f"{middle:+.1f} [{low:+.1f} {high:+.1f}]"


RULES: Mapping[str, tuple[Pruner, int]] = {
    "median, each epoch": (Median(n_startup_trials=5, n_warmup_epochs=0), 1),
    "4, 8, 16, last weights": (BEFORE, 13),
    "3, 6, 12, last weights": (SuccessiveHalving(min_resource=3, max_resource=20, averaged=False), 13),
    "3, 6, 12, averages": (SuccessiveHalving(min_resource=3, max_resource=20), 13),
    "3, 6, averages": (NOW, 13),
}
"""A rule to the pruner and the size of the groups."""


def measure_pruning(task: str, sets: int, processes: int) -> None:
    """Print which of 50 random trials, trained to their ends, each rule would have stopped."""
    calls = [
        (task, [seed for seed in range(sets) if training_seed_of(seed) == training], training)
        for training in TRAINING_SEEDS
    ]
    curves = [one for part in in_processes(_curves, calls, processes) for one in part]
    print(f"# {task}: {len(curves)} sets of 50 random trials; best pruned, epochs trained, of the top five pruned")
    for name, (pruner, group) in RULES.items():
        stopped = [_stopped(trials, TASKS[task].space(0), pruner, group) for trials in curves]
        ranked = [sorted(t, key=lambda n: t[n][1][-1].metrics["val/loss"]) for t in map(_complete, curves)]
        best = statistics.fmean(order[0] in gone for order, gone in zip(ranked, stopped, strict=True))
        epochs = statistics.fmean(
            sum(gone.get(n, len(e)) for n, (_, e) in trials.items())
            for trials, gone in zip(curves, stopped, strict=True)
        )
        by_kind: dict[str, list[bool]] = defaultdict(list)
        for trials, order, gone in zip(curves, ranked, stopped, strict=True):
            for number in order[:5]:
                by_kind[_kind(trials[number][0])].append(number in gone)
        kinds = ", ".join(
            f"{kind} {100 * statistics.fmean(v):.0f} % of {len(v)}" for kind, v in sorted(by_kind.items())
        )
        print(f"{name:24} {100 * best:5.0f} %  {epochs:6.0f}   {kinds}", flush=True)


Curves = dict[int, tuple[TrialConfig, list[EpochMetrics]]]


def _curves(call: tuple[str, list[int], int]) -> list[Curves]:
    """Train 50 random trials for each seed of a sampler."""
    task, seeds, training_seed = call
    configs: dict[int, dict[int, TrialConfig]] = {}
    for seed in seeds:
        space = dataclasses.replace(TASKS[task].space(seed), sampler=Sampler(name="random"))
        configs[seed] = {n: config for n, (config, _) in propose(space, [], first=0, size=50).items()}
    requests = {s: Request(c, lambda _e, _r: set(), lambda epoch: epoch in (3, 6, 12)) for s, c in configs.items()}
    found = train(TASKS[task].build(), requests, seed=training_seed)
    return [{n: (configs[seed][n], epochs) for n, epochs in histories.items()} for seed, histories in found.items()]


def _complete(trials: Curves) -> Curves:
    return {number: (config, epochs) for number, (config, epochs) in trials.items() if epochs[-1].finished}


def _stopped(trials: Curves, space: SearchSpace, pruner: Pruner, group: int) -> dict[int, int]:
    """Return the number of each trial that a pruner would have stopped, and after which epoch."""
    stopped: dict[int, int] = {}

    def scores(numbers: Iterable[int], epoch: int) -> dict[int, Score]:
        reached = [n for n in numbers if stopped.get(n, epoch) >= epoch and len(trials[n][1]) >= epoch]
        finished = {n: trials[n][1][:epoch] for n in reached if trials[n][1][epoch - 1].finished}
        objective = space.objective
        average = pruner.averages(epoch)
        return {n: objective.rung_score(e) if average else objective.score(e) for n, e in finished.items()}

    for first in range(0, len(trials), group):
        numbers = range(first, min(first + group, len(trials)))
        for epoch in range(1, space.epochs):
            running = scores([n for n in numbers if n not in stopped], epoch)
            earlier = list(scores(range(first), epoch).values())
            stopped |= dict.fromkeys(pruner.stops(epoch, running, earlier), epoch)
    return stopped


def _kind(config: TrialConfig) -> str:
    """Return the kind of a schedule, of StepLR with the time of its first decay."""
    schedule = config.scheduler
    if not isinstance(schedule, Step):
        return schedule.name
    return "step 2–4" if schedule.step_size < 5 else "step 5–9" if schedule.step_size < 10 else "step 10–18"


def main() -> None:
    """Compare the variants on the tasks, or measure what is pruned."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", action="append", choices=TASKS, help="one or several (default: all)")
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="beside optuna (default: all)")
    parser.add_argument("--searches", type=int, default=20, metavar="N", help="of each variant (default: 20)")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="(default: 2)")
    parser.add_argument("--pruning", action="store_true", help="measure which of 50 random trials are pruned")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    variants = [REFERENCE, *(name for name in options.variant or VARIANTS if name != REFERENCE)]
    for task in options.task or TASKS:
        if options.pruning:
            measure_pruning(task, options.searches, options.processes)
            continue
        compare(task, variants, options.searches, options.processes)


if __name__ == "__main__":
    main()
