"""Train a config: as a search trained it, or alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.app.prepare import device_name, machine, prepare
from pipeline.errors import InvalidInput, Problem
from pipeline.space.placement import Placement, from_run_lengths
from pipeline.space.search_space import Objective, SearchSpace
from pipeline.space.trial import EpochMetrics, number
from pipeline.training.contract import TrialGroup

SAME_MACHINE = {"cpu": ("device", "cpu", "cpu_capability", "torch"), "cuda": ("device", "torch")}
"""Keys that are equal on machines of one kind, where a CPU repeats a trial to the bit."""


@dataclass(frozen=True)
class Found:
    """The section `found` of a config file: a search's record of the trial."""

    epochs: int
    """Number of epochs that the search trained."""
    metrics: Mapping[str, float]
    """Metrics of the last of these epochs."""
    value: tuple[float, int] | None
    """The trial's value in the search, and the epoch of the value; None if no epoch was finished."""
    environment: Mapping[str, Any]
    placements: Sequence[Placement]
    """Placement in each epoch."""

    @classmethod
    def read(cls, found: Mapping[str, Any], *, source: str) -> Found | None:
        """Read the section; return None if it is empty.

        Raises:
            InvalidInput: The section differs from the form that a search writes.
        """
        if not found:
            return None
        try:
            placements = from_run_lengths(found["environment"]["placement"])
            epochs, metrics = found["epochs"], {**found["metrics"]}
            if type(epochs) is not int or epochs < len(placements):
                raise ValueError(f"epochs {epochs!r} for {len(placements)} placements")
            if wrong := [name for name, value in metrics.items() if type(value) not in (int, float)]:
                raise ValueError(f"{wrong[0]} {metrics[wrong[0]]!r}")
            value = (found["value"], found["epoch"]) if "value" in found else None
            if value and (type(value[0]) not in (int, float) or type(value[1]) is not int):
                raise ValueError(f"value {value[0]!r} at epoch {value[1]!r}")
            return cls(epochs, metrics, value, found["environment"], placements)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            remedy = "restore it, or remove `found` to train the config without comparing"
            message = f"must be as a search wrote it, got {type(error).__name__}: {error}; {remedy}"
            raise InvalidInput(source, [Problem("found", message)]) from None


def train_config(
    space: SearchSpace,
    found: Found | None,
    *,
    source: str,
    device: str,
    fast: bool,
    test: bool,
    say: Callable[[str], None] = print,
) -> tuple[TrialGroup, bool]:
    """Train a config for all its epochs, and report each epoch.

    The model is the one after the last epoch; after the best epoch, if that is what the config's objective ranks by.

    Args:
        space: The config, as a space of one point.
        found: A search's record of the trial: its placement is repeated, its metrics are compared.
        source: Name of the config's file, for messages.
        device: Name of the device, as `--device` takes it.
        fast: Whether to train alone, with every core, even if a search recorded the placement.
        test: Whether to report the test split too.
        say: Takes each line of the report.

    Returns:
        The group of the trial, which has number 0, with the model of the epoch that decided, and whether the trial
        finished all its epochs.
    """
    space, executor = prepare(space, source=source, device=device, searching=False)
    config = space.example()
    if test and executor.workload.test is None:
        raise InvalidInput("--test", [Problem("", f"{executor.workload.name} has no test split; leave --test away")])
    repeats = executor.device.type == "cpu" or config.deterministic
    replays = found is not None and bool(found.placements) and repeats and not fast
    compared: list[str] = []
    objective, history, best = space.objective, list[EpochMetrics](), {}
    for line in _differences(found, executor.device) if found and replays else []:
        say(line)
    alone = Placement(trainer="plain", threads=torch.get_num_threads())
    group = executor.build({0: config}, placement=found.placements if found and replays else [alone])
    for _ in range(config.epochs):
        epoch = group.train_epoch()[0]
        say(_epoch_line(epoch, config.epochs))
        if not epoch.finished:
            say(f"ended: {epoch.diverged or epoch.failed}")
            return group, False
        history.append(epoch)
        measured = objective.measured(history) if objective.of == "best" else []
        if measured and objective.deciding(measured) is epoch:
            best = copy.deepcopy(group.state_dict())
        if found and epoch.epoch == found.epochs:
            compared = _comparison(epoch, found, "in the places that it had" if replays else "alone")
    for line in compared:
        say(line)
    if best:
        group.load_state_dict(best)
        say(_best_line(objective, objective.measured(history), found, config.epochs))
    if test:
        say("test          " + "  ".join(f"{name} {number(value)}" for name, value in group.test()[0].items()))
    return group, True


def _epoch_line(epoch: EpochMetrics, epochs: int) -> str:
    metrics = "  ".join(f"{name} {number(value)}" for name, value in epoch.metrics.items())
    rates = "  ".join(f"lr/{name} {points[-1][1]:.2e}" for name, points in epoch.lr.items())
    return f"epoch {epoch.epoch:>3}/{epochs}  {metrics}  {rates}"


def _best_line(objective: Objective, measured: Sequence[EpochMetrics], found: Found | None, epochs: int) -> str:
    """Return a line that says which epoch was the best, and whether the search said the same."""
    epoch, value = objective.deciding(measured).epoch, objective.value(measured)
    line = f"best          {objective.metric} {number(value)} at epoch {epoch} of {epochs}, whose model this is"
    if found is None or found.value is None:
        return line
    if found.value == (value, epoch):
        return f"{line}; the search had the same"
    return f"{line}; the search had {number(found.value[0])} at epoch {found.value[1]}"


def _differences(found: Found, device: torch.device) -> list[str]:
    """Return lines that say why metrics will be repeated only to rounding; none if they will be repeated to the bit."""
    here = {**machine(), "device": device_name(device)}
    names = SAME_MACHINE.get(device.type, ("device", "torch"))
    changed = [name for name in names if found.environment.get(name) != here[name]]
    lines = [f"note          {name} was {found.environment.get(name)} and is {here[name]}" for name in changed]
    if any(placement.broken for placement in found.placements):
        lines.append("note          memory ran out in the search, which went on with fewer rows in a matrix")
    return [*lines, "note          so metrics are repeated to rounding"] if lines else []


def _comparison(epoch: EpochMetrics, found: Found, how: str) -> list[str]:
    """Return lines that say whether the metrics equal the search's metrics, or how far they are apart."""
    before = {name: value for name, value in found.metrics.items() if name in epoch.metrics}
    if not before:
        return []
    if before == {name: epoch.metrics[name] for name in before}:
        return ["repeated      every metric of the search, to the last bit"]
    return [
        f"{'compared' if index == 0 else '':<12}  {name} {epoch.metrics[name]!r}, the search had {value!r}: "
        f"{abs(epoch.metrics[name] - value):.1e} apart{f' ({how})' if index == 0 else ''}"
        for index, (name, value) in enumerate(before.items())
    ]
