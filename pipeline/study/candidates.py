"""What a confirmation trains: candidates and fresh seeds, a function of the ended trials and of the settings."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.space.config import TrialConfig
from pipeline.space.confirm import BASELINES, Confirm, Size, fitting, smallest
from pipeline.space.optimizers import SGD, Adam
from pipeline.space.param_groups import ParamGroup
from pipeline.space.schedules import Constant, Step
from pipeline.space.search_space import SearchSpace
from pipeline.space.trial import EndedTrial
from pipeline.study.study import Study

ADAM, SGD_STEP = "Adam's default", "SGD with StepLR"
"""Labels of the baselines."""


def is_label(text: Any) -> bool:
    """Return whether a stored value is the label of a candidate."""
    return text in (ADAM, SGD_STEP) or (isinstance(text, str) and re.fullmatch(r"#[0-9]{1,9}", text) is not None)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A config that is confirmed."""

    trial: int | None
    """Number of the trial of a finalist; None for a baseline."""
    label: str
    """`#33`, or the name of a baseline."""
    config: TrialConfig
    """With the seed of the search."""

    def with_seed(self, seed: int) -> TrialConfig:
        """Return the config of a run."""
        return dataclasses.replace(self.config, seed=seed)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, which `from_dict` reads."""
        return {"trial": self.trial, "label": self.label, "config": self.config.to_dict()}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Candidate:
        """Return a candidate that was stored."""
        trial, label = stored["trial"], stored["label"]
        if label != (f"#{trial}" if type(trial) is int else label) or not is_label(label):
            raise ValueError(f"label {label!r} of trial {trial!r}")
        return cls(trial=trial, label=label, config=TrialConfig.from_dict(stored["config"]))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The runs of a confirmation: each candidate with each seed."""

    trials: int
    """Number of ended trials that the candidates were chosen from."""
    seeds: tuple[int, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    reason: str = ""
    """Why there is no candidate; empty if there is one."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, which `from_dict` reads."""
        candidates = [candidate.to_dict() for candidate in self.candidates]
        return {"trials": self.trials, "seeds": list(self.seeds), "candidates": candidates}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Plan:
        """Return a plan that was stored."""
        candidates = tuple(map(Candidate.from_dict, stored["candidates"]))
        return cls(trials=stored["trials"], seeds=tuple(stored["seeds"]), candidates=candidates)


def plan(study: Study, confirm: Confirm) -> Plan:
    """Return which finalists and baselines of a study train again, and with which seeds.

    Args:
        study: The study.
        confirm: The settings, which may be other than those of the study's space.
    """
    complete, ended = study.best(len(study.ended)), len(study.ended)
    searched = sum(len(trial.epochs) for trial in study.ended)
    if confirm.share == 0:
        return Plan(trials=ended, reason="the confirmation is turned off")
    if not complete:
        return Plan(trials=ended, reason="no trial is complete")
    size = fitting(confirm, complete=len(complete), searched=searched, epochs=study.space.epochs)
    if size is None:
        least = smallest(confirm, complete=len(complete)).runs * study.space.epochs
        reason = f"the least, {least} epochs, would be more than {confirm.share * 100:.0f} % of all epochs"
        return Plan(trials=ended, reason=reason)
    seeds = _seeds(study.space.seed, size.seeds)
    return Plan(trials=ended, seeds=seeds, candidates=tuple(_candidates(complete, size, study.space)))


def _seeds(seed: int, count: int) -> tuple[int, ...]:
    """Return the seeds that follow the seed of the search, so that everyone can name them."""
    return tuple((seed + n) % 2**32 for n in range(1, count + 1))


def _candidates(complete: Sequence[EndedTrial], size: Size, space: SearchSpace) -> list[Candidate]:
    """Return the candidates, without repetitions of a config."""
    best = finalists(complete, space, count=size.finalists)
    chosen = [Candidate(trial=trial.number, label=f"#{trial.number}", config=trial.config) for trial in best]
    known = [candidate.config for candidate in chosen]
    baselines = itertools.islice(_baselines(complete[0].config, space), size.baselines)
    return chosen + [baseline for baseline in baselines if baseline.config not in known]


def finalists(complete: Iterable[EndedTrial], space: SearchSpace, *, count: int) -> list[EndedTrial]:
    """Return the best complete trials by their late epochs, each config once."""
    ranked = sorted(complete, key=lambda trial: (space.objective.late_score(trial.epochs), trial.number))
    return list(itertools.islice(_unlike(ranked), count))


def _unlike(trials: Sequence[EndedTrial]) -> Iterator[EndedTrial]:
    """Yield trials without those whose config an earlier one has."""
    known: list[TrialConfig] = []
    for trial in trials:
        if trial.config not in known:
            known.append(trial.config)
            yield trial


def _baselines(config: TrialConfig, space: SearchSpace) -> Iterator[Candidate]:
    """Yield the baselines: what people use who do not search.

    Each has the batch size of a config, every group at one rate, and the settings that the space does not search. A
    group that the space freezes stays frozen.
    """
    groups = {
        name: ParamGroup(
            pattern=group.pattern,
            dims=group.dims,
            layers=group.layers,
            layer_decay=None if group.layers is None else 1.0,
            lr_ratio=0.0 if space.param_groups[name]["lr_ratio"] == 0 else 1.0,
        )
        for name, group in config.param_groups.items()
    }
    clip = space.settings["clip_grad_norm"]
    same = dataclasses.replace(
        config, param_groups=groups, clip_grad_norm=clip if isinstance(clip, int | float) else None
    )
    third = max(1, -(-config.epochs // 3))
    sgd, step = SGD(base_lr=0.1, momentum=0.9), Step(step_size=third, gamma=0.1)
    strategies = {ADAM: (Adam(base_lr=1e-3), Constant()), SGD_STEP: (sgd, step)}
    assert len(strategies) == BASELINES
    for label, (optimizer, scheduler) in strategies.items():
        baseline = dataclasses.replace(same, optimizer=optimizer, scheduler=scheduler)
        yield Candidate(trial=None, label=label, config=baseline)
