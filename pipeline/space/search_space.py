"""SearchSpace: the checked content of a search-space file; `load_space` builds it, `sample` draws a TrialConfig.

A config is a space of one point, so `load_config` reads it by the same rules.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pipeline.space.config import SEARCHABLE_SETTINGS, TrialConfig, WorkloadChoice
from pipeline.space.confirm import Confirm
from pipeline.space.distributions import Choices, Suggests, extremes, is_searched, suggest
from pipeline.space.limits import Interval
from pipeline.space.optimizers import make_optimizer
from pipeline.space.own_code import is_own, recorded_name
from pipeline.space.param_groups import ParameterRule, ParamGroup
from pipeline.space.pruners import Pruner, Score, score
from pipeline.space.schedules import make_scheduler, scheduler_class
from pipeline.space.shares import resolve_floors, resolve_lengths
from pipeline.space.trial import EndedTrial, EpochMetrics

LATE_EPOCHS, LATE_SHARE = 3, 0.15
"""Most epochs, and share of a trial's epochs, whose mean score chooses the finalists of the confirmation."""
Domains = Mapping[str, Any]
"""Hyperparameter name to a value or to a distribution, `Choices` or `Range`, that a search draws from."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The validation metric that ranks trials."""

    metric: str = "val/accuracy"
    direction: Literal["minimize", "maximize"] = "maximize"
    of: Literal["last", "best"] = "last"
    """The epoch whose metric is a trial's value. The best of many noisy epochs is biased: the more epochs, the better
    it looks."""

    def measured(self, epochs: Sequence[EpochMetrics]) -> list[EpochMetrics]:
        """Return the epochs that were completed with a finite metric; only such epochs can decide."""
        return [epoch for epoch in epochs if epoch.finished and math.isfinite(epoch.metrics[self.metric])]

    def deciding(self, epochs: Sequence[EpochMetrics]) -> EpochMetrics:
        """Return which of a trial's epochs gives its value; of equally good ones, the earliest."""
        return epochs[-1] if self.of == "last" else min(epochs, key=self._score_after)

    def value(self, epochs: Sequence[EpochMetrics]) -> float:
        """Return the value of a trial with these epochs."""
        return self.deciding(epochs).metrics[self.metric]

    def score(self, epochs: Sequence[EpochMetrics]) -> Score:
        """Return the score of a trial with these epochs, by which trials are ranked."""
        return self._score_after(self.deciding(epochs))

    def rung_score(self, epochs: Sequence[EpochMetrics]) -> Score:
        """Return the score of a running trial with these epochs: of its averaged weights, if they were evaluated."""
        averaged = epochs[-1].averaged
        if all(math.isfinite(averaged.get(name, math.nan)) for name in (self.metric, "val/loss")):
            return score(averaged[self.metric], averaged["val/loss"], direction=self.direction)
        return self.score(epochs)

    def late_score(self, epochs: Sequence[EpochMetrics]) -> Score:
        """Return the mean score of the last epochs, which depends less on luck than that of the last.

        These are 15 % of the epochs, at most three. If the best epoch decides, return the score.
        """
        if self.of == "best":
            return self.score(epochs)
        count = min(LATE_EPOCHS, math.ceil(LATE_SHARE * len(epochs)))
        values, losses = zip(*map(self._score_after, self.measured(epochs)[-count:]), strict=True)
        return statistics.fmean(values), statistics.fmean(losses)

    def order(self, trial: EndedTrial) -> tuple[Score, int]:
        """Return what sorts complete trials, best first: value, then validation loss, then number."""
        return self.score(trial.epochs), trial.number

    def _score_after(self, epoch: EpochMetrics) -> Score:
        loss = epoch.metrics.get("val/loss", 0.0)  # a training loop may have none
        return score(epoch.metrics[self.metric], loss, direction=self.direction)


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """The sampler of Optuna that proposes trials."""

    name: Literal["tpe", "gp", "random", "qmc"] = "tpe"
    n_startup_trials: Annotated[int, Interval(ge=1)] = 10
    """Random trials before TPE and GP fit their first model."""
    group_size: Annotated[int, Interval(ge=1)] | None = None
    """Trials that are proposed, and begin, at a time; by default 8, or one for each core of a CPU that has more, or 25
    as rows on CUDA. More at a time train faster, since more share a matrix; fewer learn from more."""


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """An earlier study of the same root, the best configs of which are tried first."""

    study: str
    """Name of the study, which need not be finished."""
    best: Annotated[int, Interval(ge=1, le=100)] = 5
    """Number of configs to take: the confirmed winner, then the best by the mean objective of their last epochs."""


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """Everything that decides a search, except how many trials it runs and where."""

    name: str
    """The file's name without its suffix, in the letters that `--study` takes; names the studies."""
    workload: WorkloadChoice
    settings: Domains
    """Each of `SETTINGS` with its value; one of `SEARCHABLE_SETTINGS` may have a distribution instead."""
    steps_per_epoch: Mapping[int, int] | None
    """Batch size to optimizer steps per epoch; None unless a schedule that moves every step has a share of the run."""
    objective: Objective
    optimizers: Mapping[str, Domains]
    """Optimizer name to its hyperparameters; a trial has one optimizer."""
    schedulers: Mapping[str, Domains]
    param_groups: Mapping[str, Domains]
    """Group name to the fields of a `ParamGroup`, in the order in which groups are tried."""
    no_weight_decay: tuple[ParameterRule, ...]
    """Parameters that any of the rules takes have no weight decay, in every group."""
    sampler: Sampler
    pruner: Pruner
    confirm: Confirm
    enqueue: tuple[Mapping[str, Any], ...]
    """Configs to try first, as values by parameter name; parameters without a value are sampled."""
    warm_start: WarmStart | None
    """The earlier study that `enqueue` names; None if `enqueue` is a list, as it always is in a stored study."""
    document: Mapping[str, Any]
    """The content of the file with every default filled in: equal documents mean equal spaces."""

    @property
    def epochs(self) -> int:
        """Passes over the training data per trial."""
        return int(self.settings["epochs"])

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Each number of samples per optimizer step that a trial may have."""
        return extremes(self.settings["batch_size"])

    @property
    def accumulate(self) -> int:
        """Batches per optimizer step."""
        return int(self.settings["accumulate"])

    @property
    def seed(self) -> int:
        """The seed of the search and of every trial."""
        return int(self.settings["seed"])

    @property
    def precision(self) -> str:
        """Arithmetic of forward and backward passes."""
        return str(self.settings["precision"])

    def run_length(self, interval: str, *, batch_size: int | None = None) -> int | None:
        """Return the length of a run in a schedule's interval; None while the number of steps is not known.

        Args:
            interval: "epoch" or "step".
            batch_size: Of the trial; None: of every trial, whose steps are known only if there is one batch size.
        """
        if interval == "epoch":
            return self.epochs
        size = self.batch_sizes[0] if len(self.batch_sizes) == 1 else batch_size
        return None if size is None or self.steps_per_epoch is None else self.epochs * self.steps_per_epoch[size]

    def sample(self, trial: Suggests) -> TrialConfig:
        """Let a trial choose a value for every searched parameter."""
        optimizer = suggest(trial, "optimizer", _one_of(self.optimizers))
        optimizer_values = _suggest_all(trial, self.optimizers[optimizer], prefix=f"{optimizer}.")
        scheduler = suggest(trial, "scheduler", _one_of(self.schedulers))
        scheduler_values = _suggest_all(trial, self.schedulers[scheduler], prefix=f"{scheduler}.")
        groups = {
            name: ParamGroup(**_suggest_all(trial, group, suffix=f".{name}"))
            for name, group in self.param_groups.items()
        }
        ratios = [ratio for group in groups.values() for ratio in group.ratios() if ratio > 0]
        lowest = optimizer_values["base_lr"] * min(ratios, default=1.0)
        scheduler_values = resolve_floors(scheduler_class(scheduler), scheduler_values, rate=lowest)
        settings = _suggest_all(trial, self.settings)
        total = self.run_length(scheduler_values["interval"], batch_size=settings["batch_size"])
        scheduler_values = resolve_lengths(scheduler_class(scheduler), scheduler_values, total=total)
        return TrialConfig(
            workload=self.workload,
            **settings,
            optimizer=make_optimizer(optimizer, optimizer_values),
            scheduler=make_scheduler(scheduler, scheduler_values),
            param_groups=groups,
            no_weight_decay=self.no_weight_decay,
        )

    def example(self) -> TrialConfig:
        """Return one config of the space, always the same one."""
        return self.sample(_First())

    def parameters(self) -> dict[str, Any]:
        """Return every parameter by its Optuna name, such as `adamw.base_lr` or `lr_ratio.head`."""
        named = {"optimizer": _one_of(self.optimizers), "scheduler": _one_of(self.schedulers)}
        for owner, domains in [*self.optimizers.items(), *self.schedulers.items()]:
            named |= {f"{owner}.{name}": domain for name, domain in domains.items()}
        for group, domains in self.param_groups.items():
            named |= {f"{name}.{group}": domain for name, domain in domains.items()}
        settings = {name: self.settings[name] for name in SEARCHABLE_SETTINGS}
        return named | {name: domain for name, domain in settings.items() if domain is not None}

    def searched_hyperparameters(self) -> tuple[str, ...]:
        """Return the hyperparameters that differ between trials, named as in `TrialConfig.hyperparameters`."""
        recorded = {
            f"{owner}.{name}": recorded_name(kind, owner, name)
            for kind, options in self._options().items()
            for owner, domains in options.items()
            for name in domains
        }
        names = [recorded.get(name, name) for name, domain in self.parameters().items() if is_searched(domain)]
        return tuple(dict.fromkeys(names))

    def shared_hyperparameters(self) -> tuple[str, ...]:
        """Return the searched hyperparameters that every trial has, whatever its optimizer and schedule."""
        owned: set[str] = set()
        shared: set[str] = set()
        for kind, options in self._options().items():
            names = [{recorded_name(kind, owner, name) for name in domains} for owner, domains in options.items()]
            owned |= set.union(*names)
            shared |= set.intersection(*names)
        return tuple(name for name in self.searched_hyperparameters() if name in shared or name not in owned)

    def own_code(self) -> tuple[str, ...]:
        """Return the names of the optimizers and schedules that are a person's own."""
        return tuple(name for options in self._options().values() for name in options if is_own(name))

    def _options(self) -> dict[str, Mapping[str, Domains]]:
        return {"optimizer": self.optimizers, "scheduler": self.schedulers}


def _one_of(options: Mapping[str, Any]) -> Any:
    return Choices[str](choices=tuple(options))


def _suggest_all(trial: Suggests, domains: Domains, *, prefix: str = "", suffix: str = "") -> dict[str, Any]:
    return {name: suggest(trial, f"{prefix}{name}{suffix}", domain) for name, domain in domains.items()}


class _First:
    """A trial that chooses the lowest or first value of everything."""

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        return low

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        return low

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return choices[0]
