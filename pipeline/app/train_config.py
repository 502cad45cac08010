"""Train a config: as a search trained it, or alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from pipeline.app.device import device_name, machine
from pipeline.app.found import Found
from pipeline.app.prepare import prepare
from pipeline.errors import InvalidInput, Problem, TrainingEnded
from pipeline.space.placement import Placement
from pipeline.space.search_space import Objective, SearchSpace
from pipeline.space.trial import EpochMetrics, number
from pipeline.workloads.loop import Loop
from pipeline.workloads.workload import Workload

SAME_MACHINE = {"cpu": ("device", "cpu", "cpu_capability", "torch"), "cuda": ("device", "torch")}
"""Keys that are equal on machines of one kind, where a CPU repeats a trial to the bit."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A config that was trained; its `repr` shows the metrics alone."""

    model: nn.Module = field(repr=False)
    """The trained model, on the CPU and in evaluation mode."""
    metrics: Mapping[str, float]
    """Metrics of the epoch whose model this is, and `test/…` if they were asked for."""
    history: tuple[EpochMetrics, ...] = field(repr=False)
    """Results of each epoch; `pandas.DataFrame(epoch.metrics for epoch in history)` is a table of them."""
    workload: Workload | Loop = field(repr=False)
    """What was trained, with its data on the device."""


def train_config(
    space: SearchSpace,
    found: Found | None,
    *,
    source: str,
    device: str,
    fast: bool,
    test: bool,
    say: Callable[[str], None],
    workload: Workload | Loop | None = None,
) -> Trained:
    """Train a config for all its epochs, and report each epoch.

    The model is the one after the last epoch; after the best epoch, if that is what the config's objective ranks by.

    Args:
        space: The config, as a space of one point.
        found: A search's record of the trial: its placement is repeated, its metrics are compared.
        source: Name of the config, for messages.
        device: Name of the device, as `--device` takes it.
        fast: Whether to train alone, with every core, even if a search recorded the placement.
        test: Whether to report the test split too.
        say: Takes each line of the report.
        workload: Replaces the workload that the config names.

    Raises:
        InvalidInput: With every problem of the config for its workload.
        TrainingEnded: The config diverged, or its model, loss or metric raised.
    """
    space, executor = prepare(space, source=source, device=device, searching=False, workload=workload)
    config = space.example()
    if test and executor.workload.test is None:
        message = f"{executor.workload.name} has no test split; leave --test away (from Python: test=True)"
        raise InvalidInput("test", [Problem("", message)])
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
            raise TrainingEnded(f"{source}: training ended: {epoch.diverged or epoch.failed}")
        history.append(epoch)
        measured = objective.measured(history) if objective.of == "best" else []
        if measured and objective.deciding(measured) is epoch:
            best = copy.deepcopy(group.state_dict())
        if found and epoch.epoch == found.epochs:
            compared = _comparison(epoch, found, "in the places that it had" if replays else "alone")
    for line in compared:
        say(line)
    metrics = dict(history[-1].metrics)
    if best:
        group.load_state_dict(best)
        measured = objective.measured(history)
        metrics = dict(objective.deciding(measured).metrics)
        say(_best_line(objective, measured, found, config.epochs))
    if test:
        tested = group.test()[0]
        say("test          " + "  ".join(f"{name} {number(value)}" for name, value in tested.items()))
        metrics |= tested
    model = executor.untrained_model(config)  # what is no part of the trained state is as it was
    model.load_state_dict({**model.state_dict(), **group.model_state(0)})
    return Trained(model=model.eval(), metrics=metrics, history=tuple(history), workload=executor.workload)


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
