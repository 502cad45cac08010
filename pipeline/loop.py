"""Drives a group of trials epoch by epoch: train, judge, end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pipeline.config import TrialConfig
from pipeline.study import Study
from pipeline.trainer import EpochMetrics, TrialGroup
from pipeline.trial import EndedTrial, TrialState

Proposals = Mapping[int, tuple[TrialConfig, dict[str, Any]]]
"""Trial number to its config and to the parameters that the sampler chose."""


def run_group(
    group: TrialGroup,
    proposals: Proposals,
    study: Study,
    *,
    environment: Callable[[TrialConfig], Mapping[str, Any]],
    on_epoch: Callable[[Mapping[int, EpochMetrics]], None],
    interrupted: Callable[[], bool],
) -> Iterator[EndedTrial]:
    """Train a group's trials to their ends, each of which comes as soon as all lower numbers have ended.

    Args:
        group: Trains them.
        proposals: From `study.next_group`.
        study: Gives the verdicts.
        environment: Gives what is noted of where a config was trained.
        on_epoch: Told each epoch's metrics.
        interrupted: Asked after each epoch; if it says so, what is still running is left.
    """
    started = time.time()
    running = set(proposals)
    epochs: dict[int, list[EpochMetrics]] = {number: [] for number in proposals}
    waiting = sorted(proposals)
    ended: dict[int, EndedTrial] = {}
    while running:
        results = group.train_epoch()
        on_epoch(results)
        for number, metrics in results.items():
            epochs[number].append(metrics)
        outcomes = _outcomes(results, proposals, study)
        for number, (state, reason) in outcomes.items():
            if results[number].finished:
                group.drop(number)
            config, params = proposals[number]
            complete = state is TrialState.COMPLETE
            ended[number] = EndedTrial(
                number=number,
                config=config,
                params=params,
                state=state,
                reason=reason,
                value=results[number].metrics[study.space.objective.metric] if complete else None,
                epochs=tuple(epochs[number]),
                started=started,
                ended=time.time(),
                environment=environment(config),
            )
        running -= outcomes.keys()
        while waiting and waiting[0] in ended:
            yield ended[waiting.pop(0)]
        if interrupted():
            return


def _outcomes(
    results: Mapping[int, EpochMetrics], proposals: Proposals, study: Study
) -> dict[int, tuple[TrialState, str | None]]:
    """Say which trials end with this epoch, how, and why."""
    outcomes: dict[int, tuple[TrialState, str | None]] = {}
    judged = {}
    for number, metrics in results.items():
        if metrics.failed:
            outcomes[number] = TrialState.FAILED, metrics.failed
        elif metrics.diverged:
            outcomes[number] = TrialState.DIVERGED, metrics.diverged
        elif metrics.epoch == proposals[number][0].epochs:
            outcomes[number] = TrialState.COMPLETE, None
        else:
            judged[number] = metrics
    if judged:
        epoch = next(iter(judged.values())).epoch
        reason = f"{study.space.pruner.name} after epoch {epoch}"
        outcomes |= dict.fromkeys(study.stops(epoch, judged), (TrialState.PRUNED, reason))
    return outcomes
