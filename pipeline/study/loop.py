"""Drives a group of trials epoch by epoch: train, judge, end; and goes on from a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import InvalidInput, Problem
from pipeline.space.config import TrialConfig
from pipeline.space.trial import EndedTrial, EpochMetrics, TrialState
from pipeline.study.checkpoint import Checkpoints
from pipeline.study.group_state import Proposals, UnderWay
from pipeline.study.study import Study
from pipeline.training.contract import TrialGroup


def run_group(
    group: TrialGroup,
    proposals: Proposals,
    study: Study,
    *,
    checkpoints: Checkpoints,
    environment: Callable[[TrialConfig], Mapping[str, Any]],
    on_epoch: Callable[[Mapping[int, EpochMetrics]], None],
    interrupted: Callable[[], bool],
) -> Iterator[EndedTrial]:
    """Train a group's trials to their ends, each of which comes as soon as all lower numbers have ended.

    What asks for them stores each before it asks for the next, so that a checkpoint and what is stored are together
    all that was done. The group goes on from its last checkpoint, if there is one.

    Args:
        group: Trains them; new.
        proposals: From `study.next_group`.
        study: Gives the verdicts.
        checkpoints: Where a checkpoint is saved when one is due, and on an interruption.
        environment: Gives what is noted of where a config was trained.
        on_epoch: Told each epoch's metrics.
        interrupted: Asked after each epoch; if it says so, what is still running is left, in a checkpoint.

    Raises:
        InvalidInput: The checkpoint is of these trials, but does not fit their model.
        StorageError: A checkpoint cannot be written.
    """
    metric = study.space.objective.metric
    under_way = UnderWay(proposals, study=study.identity, metric=metric, environment=environment)
    _resume(group, under_way, checkpoints)
    yield from under_way.pop_ended()
    while under_way.running:
        results = group.train_epoch()
        on_epoch(results)
        under_way.add(results)
        for number, (state, reason) in _outcomes(results, proposals, study).items():
            if results[number].finished:
                group.drop(number)
            under_way.end(number, state, reason)
        yield from under_way.pop_ended()
        stop = interrupted()
        if under_way.running and (stop or checkpoints.due()):
            name = f"trials-to-{max(proposals):06}-epoch-{under_way.epoch:06}.pt"
            checkpoints.save(name, lambda: {**under_way.to_dict(), "state": group.state_dict()})
        if stop:
            break
    if not under_way.running:
        checkpoints.clear()


def forget_ended(checkpoints: Checkpoints, study: Study) -> None:
    """Remove the checkpoints of a group all of whose trials are stored: a crash may have left them."""
    for _, content in checkpoints.load():
        if content["last"] < len(study.ended):
            checkpoints.clear()
            return


def _resume(group: TrialGroup, under_way: UnderWay, checkpoints: Checkpoints) -> None:
    """Go on from the newest checkpoint of these trials, and remove all others."""
    for path, content in checkpoints.load():
        if content["last"] < min(under_way.proposals):
            break  # of trials that have ended since
        if why := under_way.why_not(content):
            kept = checkpoints.put_aside(path)
            checkpoints.warn(f"{path}: not used, its trials train anew: {why}; it is kept as {kept.name}")
            continue
        under_way.load_dict(content)
        try:
            group.load_state_dict(content["state"])
        except (RuntimeError, KeyError, ValueError) as error:
            raise _does_not_fit(path, error) from error
        checkpoints.clear(but=path)
        return
    checkpoints.clear()


def _does_not_fit(path: Path, error: Exception) -> InvalidInput:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    remedy = "if the model has changed, change it back; or remove the file, and its trials train anew"
    return InvalidInput(str(path), [Problem("", f"does not fit the model: {reason}; {remedy}")])


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
        elif not math.isfinite(value := metrics.metrics[study.space.objective.metric]):
            reason = f"{study.space.objective.metric} became {value} after epoch {metrics.epoch}"
            outcomes[number] = TrialState.DIVERGED, reason
        elif metrics.epoch == proposals[number][0].epochs:
            outcomes[number] = TrialState.COMPLETE, None
        else:
            judged[number] = metrics
    if judged:
        epoch = next(iter(judged.values())).epoch
        reason = f"{study.space.pruner.name} after epoch {epoch}"
        outcomes |= dict.fromkeys(study.stops(epoch, judged), (TrialState.PRUNED, reason))
    return outcomes
