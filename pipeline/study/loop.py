"""The loop that drives a group of trials epoch by epoch (train, judge, end) and resumes from a checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from pipeline.errors import InvalidInput, Problem, StorageError
from pipeline.space.placement import PlacementRules
from pipeline.space.search_space import SearchSpace
from pipeline.space.trial import BegunTrial, EndedTrial, EpochMetrics, TrialState
from pipeline.study.checkpoint import STATES, Checkpoints
from pipeline.study.group_state import GroupState, Proposals
from pipeline.study.models import Models
from pipeline.training.contract import GroupLost, TrialGroup


class GroupOwner(Protocol):
    """Whose trials a group trains, and who stores them: a study, or its confirmation."""

    @property
    def identity(self) -> str:
        """What differs between two owners whose trials have the same numbers."""
        ...

    @property
    def space(self) -> SearchSpace:
        """The search space."""
        ...

    @property
    def rules(self) -> PlacementRules:
        """The rules of placement that are stored."""
        ...

    def keep_rules(self, rules: PlacementRules) -> None:
        """Store the placement rules if they have changed."""
        ...

    def stored(self, number: int) -> EndedTrial | None:
        """Return a trial that has ended and is stored; None if it is not."""
        ...

    def averages(self, epoch: int) -> bool:
        """Return whether trials are ranked by averaged weights after an epoch."""
        ...

    def stops(self, epoch: int, running: Mapping[int, Sequence[EpochMetrics]]) -> set[int]:
        """Return which running trials of a group stop after an epoch."""
        ...


def run_group(
    group: TrialGroup,
    proposals: Proposals,
    study: GroupOwner,
    *,
    checkpoints: Checkpoints,
    environment: Mapping[str, Any],
    on_epoch: Callable[[Mapping[int, EpochMetrics]], None],
    interrupted: Callable[[], bool],
    rules: Callable[[], PlacementRules],
    on_begin: Callable[[BegunTrial], None] = lambda _: None,
    on_end: Callable[[EndedTrial], None] = lambda _: None,
    models: Models | None = None,
    training: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
) -> Generator[Sequence[EndedTrial]]:
    """Train a group, from its last checkpoint if there is one; yield in number order the trials that an epoch ended.

    The caller must store them before advancing the iterator, as `store_each` does; database plus checkpoint are then
    the complete record. If trials cannot be stored, a checkpoint is saved with them.

    Args:
        group: All trials of the group, untrained.
        proposals: From `study.next_group`.
        study: Gives the verdicts, and knows which trials are stored.
        checkpoints: Saves a checkpoint when one is due, and on an interruption.
        environment: Recorded with each trial: device, machine, versions.
        on_epoch: Takes the metrics of each epoch.
        interrupted: Called after each epoch; on True, a checkpoint is saved and the iterator ends.
        rules: Returns what placement depends on now. After the row limit has fallen, a checkpoint is saved at once, and
            then the rules are stored: epochs before are trained again only by the rules that they were trained by.
        on_begin: Takes each trial that begins, or goes on from the checkpoint.
        on_end: Takes each trial as it ends, which is before all lower numbers have ended.
        models: Keeps the models of trials that may win.
        training: Entered while trials train and while they are saved, which uses nothing that other groups use.

    Raises:
        InvalidInput: The checkpoint belongs to these trials, but does not fit their model.
        StorageError: A checkpoint cannot be written.
    """
    ended = {number: trial for number in proposals if (trial := study.stored(number)) is not None}
    study.keep_rules(rules())
    state = GroupState(
        proposals,
        ended,
        study=study.identity,
        objective=study.space.objective,
        environment=environment,
        row_limit=study.rules.row_limit,
    )
    with training():
        _resume(group, state, checkpoints)
    for begun in state.begun():
        on_begin(begun)
    for trial in state.not_stored():
        on_end(trial)
    if done := state.pop_ended():
        yield done
    while state.running:
        average = study.averages(state.epoch + 1)
        with training():
            results = _train_epoch(group, state, checkpoints, rules, average=average)
        on_epoch(results)
        state.add(results)
        for number, (outcome, reason) in _outcomes(results, state, study).items():
            on_end(trial := state.end(number, outcome, reason))
            if models is not None:
                with contextlib.suppress(GroupLost):  # the next epoch raises it again
                    models.offer(trial, functools.partial(group.model_state, number))
            group.drop(number)
        try:
            if done := state.pop_ended():
                yield done
        except StorageError:
            with contextlib.suppress(StorageError):  # the first error is the one to report
                _save(group, state, checkpoints, row_limit=rules().row_limit)
            raise
        stop = interrupted()
        row_limit_fell = rules().row_limit != study.rules.row_limit
        if state.running and (stop or row_limit_fell or checkpoints.due()):
            with training():
                _save(group, state, checkpoints, row_limit=rules().row_limit)
        study.keep_rules(rules())
        if stop:
            break
    if not state.running and all(study.stored(number) for number in proposals):
        checkpoints.clear()
        checkpoints.forget_unused(before=_name(max(proposals) + 1))
    elif not state.running:  # other groups have trials of lower numbers; `forget_ended` removes the checkpoint
        _save(group, state, checkpoints, row_limit=rules().row_limit)


def store_each(ended: Generator[Sequence[EndedTrial]], add: Callable[..., None]) -> None:
    """Store the trials of a group as they end.

    Raises:
        StorageError: Trials cannot be stored; the group has saved a checkpoint with them.
    """
    for trials in ended:
        try:
            add(*trials)
        except StorageError as error:
            ended.throw(error)


def forget_ended(checkpoints: Checkpoints, study: GroupOwner) -> None:
    """Remove checkpoints of a group whose trials are all stored; a crash may have left such checkpoints."""
    for _, content in checkpoints.load():
        if study.stored(content["last"]) is not None:
            checkpoints.clear()
            return


def _train_epoch(
    group: TrialGroup,
    state: GroupState,
    checkpoints: Checkpoints,
    rules: Callable[[], PlacementRules],
    *,
    average: bool,
) -> dict[int, EpochMetrics]:
    """Train every running trial for an epoch.

    A lost group returns to its last checkpoint and trains again up to this epoch. Metrics and verdicts of the epochs in
    between stay: an ended trial leaves after the same epoch. If the row limit has fallen since the checkpoint, these
    epochs are trained in other places, and the trials are broken.
    """
    epoch: int | None = state.epoch
    unfinished: dict[int, EpochMetrics] = {}  # of trials that left as epochs were trained again
    while True:
        try:
            if epoch is None:
                epoch, row_limit = _load_newest(group, state, checkpoints)
                if epoch < state.epoch and _places_differ(row_limit, rules().row_limit, len(state.proposals)):
                    state.mark_broken()
            for number in state.left_by(epoch):
                group.drop(number)
            results = group.train_epoch(average=average)
        except GroupLost as lost:
            checkpoints.warn(str(lost))
            epoch = None
            continue
        epoch += 1
        if epoch > state.epoch:
            return {n: results[n] if n in results else unfinished[n] for n in sorted(state.running)}
        unfinished |= {n: dataclasses.replace(m, placement=None) for n, m in results.items() if not m.finished}


def _places_differ(before: int | None, now: int | None, trials: int) -> bool:
    """Return whether two row limits place so many trials differently; another worker has another limit."""
    return min(before or trials, trials) != min(now or trials, trials)


def _load_newest(group: TrialGroup, state: GroupState, checkpoints: Checkpoints) -> tuple[int, int | None]:
    """Load a running group's newest checkpoint, or its beginning; return its number of epochs and its row limit."""
    for _, content in checkpoints.load():
        group.load_state_dict(_state(content))
        return content["epoch"], content["row_limit"]
    group.load_state_dict({})
    return 0, state.row_limit


def _save(group: TrialGroup, state: GroupState, checkpoints: Checkpoints, *, row_limit: int | None) -> None:
    name = f"{_name(max(state.proposals))}-epoch-{state.epoch:06}.pt"
    with contextlib.suppress(GroupLost):  # the next epoch raises it again
        content = {**state.to_dict(), "row_limit": row_limit}
        checkpoints.save(name, content, group.trial_states)


def _state(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of the group that a checkpoint holds."""
    return {"epochs": content["epoch"], "trials": content[STATES]}


def _name(last: int) -> str:
    """Return how the names of the checkpoints of a group begin, by the number of the group's last trial."""
    return f"trials-to-{last:06}"


def _resume(group: TrialGroup, state: GroupState, checkpoints: Checkpoints) -> None:
    """Load the newest checkpoint of these trials, and remove all others."""
    for path, content in checkpoints.load():
        if content["last"] < min(state.proposals):
            break  # an earlier group, whose trials have ended
        if why := state.mismatch(content):
            kept = checkpoints.put_aside(path)
            checkpoints.warn(f"{path}: not used, its trials train from the beginning: {why}; it is kept as {kept.name}")
            continue
        state.load_dict(content)
        try:
            with contextlib.suppress(GroupLost):  # the next epoch raises it again
                group.load_state_dict(_state(content))
        except (RuntimeError, KeyError, ValueError) as error:
            raise _does_not_fit(path, error) from error
        checkpoints.clear(but=path)
        return
    checkpoints.clear()


def _does_not_fit(path: Path, error: Exception) -> InvalidInput:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    remedy = "if the model has changed, change it back; or remove the file to train its trials from the beginning"
    return InvalidInput(str(path), [Problem("", f"does not fit the model: {reason}; {remedy}")])


def _outcomes(
    results: Mapping[int, EpochMetrics], state: GroupState, study: GroupOwner
) -> dict[int, tuple[TrialState, str | None]]:
    """Return the state and the reason of each trial that ends with this epoch."""
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
        elif metrics.epoch == state.proposals[number][0].epochs:
            outcomes[number] = TrialState.COMPLETE, None
        else:
            judged[number] = state.history(number)
    if judged:
        epoch = next(iter(judged.values()))[-1].epoch
        reason = f"{study.space.pruner.name} after epoch {epoch}"
        outcomes |= dict.fromkeys(study.stops(epoch, judged), (TrialState.PRUNED, reason))
    return outcomes
