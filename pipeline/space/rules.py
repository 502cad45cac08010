"""Rules of a search space that connect several of its parts.

A rule must hold for every config that the space can draw, so a rule is checked at the endpoints of each distribution.
A space that breaks a rule is refused. Nothing is adjusted, so what is recorded is what was trained. Rules of a single
optimizer or schedule are methods of its class.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pipeline.errors import Problem, counted
from pipeline.space.config import Own
from pipeline.space.distributions import Range, extremes, is_searched
from pipeline.space.limits import Share
from pipeline.space.optimizers import optimizer_class
from pipeline.space.param_groups import ParamGroup
from pipeline.space.pruners import SuccessiveHalving
from pipeline.space.schedules import scheduler_class
from pipeline.space.shares import resolve_lengths

if TYPE_CHECKING:
    from pipeline.space.search_space import SearchSpace


def problems(space: SearchSpace) -> Iterator[Problem]:
    """Yield the problems of a space that its file alone shows."""
    if not space.objective.metric.startswith("val/"):
        message = f"must be a validation metric, such as val/accuracy, got {space.objective.metric!r}"
        yield Problem("objective.metric", message)
    if isinstance(space.settings["batch_size"], Range):
        message = (
            "must be one value or `{choices: […]}`, got a range; trials of one batch size train together, so name "
        )
        yield Problem("batch_size", message + "a few sizes")
    if isinstance(space.workload, Own):
        yield from _searched_arguments(space.workload.arguments, "workload.arguments")
    for kind, options in (("optimizer", space.optimizers), ("scheduler", space.schedulers)):
        if not options:
            yield Problem(kind, f"must name at least one {kind}")
    for name, optimizer in space.optimizers.items():
        for problem in optimizer_class(name).problems(_extremes(optimizer)):
            yield Problem(f"optimizer.{name}.{problem.place}", problem.message)
    for name in space.schedulers:
        scheduler = _declared(space, name)
        yield from length_problems(space, name, steps_per_epoch=None)
        yield from _rate_floor_problems(space, f"scheduler.{name}", scheduler)
        yield from _momentum_problems(space, f"scheduler.{name}", scheduler)
    if "rprop" in space.optimizers:
        yield from _rprop_problems(space)
    yield from _weight_decay_problems(space)
    for name, group in space.param_groups.items():
        yield from _group_problems(f"param_groups.{name}", group)
    if any(rule.pattern is None and rule.dims is None for rule in space.no_weight_decay):
        yield Problem("no_weight_decay", "needs a pattern or dims in each rule; add one, such as dims: 1")
    if all(0 in extremes(group["lr_ratio"]) for group in space.param_groups.values()):
        yield Problem("param_groups", "every group can be frozen (lr_ratio 0) at once; give one a ratio above 0")


def warnings(space: SearchSpace) -> Iterator[str]:
    """Yield what is legal in a space but probably not meant."""
    for name, distribution in space.parameters().items():
        if isinstance(distribution, Range) and distribution.low == distribution.high:
            yield f"{name}: low equals high, so this is the constant {distribution.low}"
    for name in space.schedulers:
        scheduler = _declared(space, name)
        default = getattr(scheduler_class(name), "gamma", None)
        if default != 1.0 and extremes(scheduler.get("gamma")) == (1.0,):
            yield f"scheduler.{name}.gamma: a gamma of 1 leaves the rate as it is"
    pruner = space.pruner
    if isinstance(pruner, SuccessiveHalving) and pruner.min_resource > pruner.max_resource:
        places = f"min_resource, {pruner.min_resource}, is after max_resource, {pruner.max_resource}"
        yield f"pruner: no trial stops, since {places}; lower the one, or raise the other"


def _extremes(distributions: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    return {name: extremes(distribution) for name, distribution in distributions.items()}


def _declared(space: SearchSpace, name: str) -> dict[str, Any]:
    """Return a schedule's fields by name, without the hyperparameters of a person's own, of which no rule is known."""
    declared = {field.name for field in dataclasses.fields(scheduler_class(name))}
    return {field: domain for field, domain in space.schedulers[name].items() if field in declared}


def _searched_arguments(arguments: Any, place: str) -> Iterator[Problem]:
    """Refuse choices and ranges in the arguments of a workload, which would get them as dicts."""
    if isinstance(arguments, Mapping):
        keys = arguments.keys()
        if keys == {"choices"} or {"low", "high"} <= keys <= {"low", "high", "log", "step"}:
            message = f"arguments of a workload cannot be searched, got {dict(arguments)}"
            yield Problem(place, f"{message}; give one value, and run a search for each")
        for name, value in arguments.items():
            yield from _searched_arguments(value, f"{place}.{name}")


def length_problems(
    space: SearchSpace, name: str, *, steps_per_epoch: int | None, batch_size: int | None = None
) -> Iterator[Problem]:
    """Yield what does not fit the length of the run.

    Args:
        space: The search space.
        name: The schedule's.
        steps_per_epoch: None while unknown; a schedule that moves every step is not checked then.
        batch_size: Named in messages, if trials differ in it.
    """
    unit = space.schedulers[name]["interval"]
    if unit == "step" and steps_per_epoch is None:
        return
    total = space.epochs * (steps_per_epoch or 1)
    schedule = resolve_lengths(scheduler_class(name), _declared(space, name), total=total)
    place, run = f"scheduler.{name}", "the run" if batch_size is None else f"the run at batch_size {batch_size}"
    warmup = max(extremes(schedule.get("warmup", 0)))
    if warmup >= total:
        yield Problem(f"{place}.warmup", f"must be shorter than {run} of {counted(total, unit)}, got {warmup}")
        return
    left = f"the {counted(total - warmup, unit)} of {run}" + (" after the warm-up" if warmup else "")
    for problem in scheduler_class(name).problems(_extremes(schedule), total - warmup, left):
        yield Problem(f"{place}.{problem.place}", problem.message)


def _group_problems(place: str, group: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield what is wrong with how a group says which parameters it takes."""
    if group["pattern"] is None and group["dims"] is None and group["layers"] is None:
        yield Problem(place, "needs a pattern, dims or layers, which say what it takes; add one, such as pattern: '*'")
    if group["pattern"] is not None and group["layers"] is not None:
        yield Problem(f"{place}.layers", "stand in place of a pattern; remove one of the two")
    if group["layers"] is not None and group["layer_decay"] is None:
        yield Problem(f"{place}.layer_decay", "is missing, and layers need it; add it, such as layer_decay: 0.75")
    if group["layers"] is None and group["layer_decay"] is not None:
        yield Problem(f"{place}.layer_decay", "needs layers; give the patterns of the layers in place of the pattern")


def _rate_floor_problems(space: SearchSpace, place: str, scheduler: Mapping[str, Any]) -> Iterator[Problem]:
    """Refuse a floor above the smallest rate that the space can draw: PyTorch would raise the rate to the floor."""
    ratios = [
        ratio
        for group in space.param_groups.values()
        for lr_ratio, layer_decay in itertools.product(extremes(group["lr_ratio"]), extremes(group["layer_decay"]))
        for ratio in ParamGroup(layers=group["layers"], layer_decay=layer_decay, lr_ratio=lr_ratio).ratios()
        if ratio > 0
    ]
    for field in ("eta_min", "min_lr"):
        floors = [floor for floor in extremes(scheduler.get(field, 0.0)) if not isinstance(floor, Share)]
        floor = max(floors, default=0.0)
        for name, optimizer in space.optimizers.items():
            lowest = min(extremes(optimizer["base_lr"])) * min(ratios, default=1.0)
            if floor > lowest:
                message = f"must be at most the smallest rate, {lowest:g} of {name} times its lr_ratio, got {floor:g}"
                yield Problem(f"{place}.{field}", message)


def _momentum_problems(space: SearchSpace, place: str, scheduler: Mapping[str, Any]) -> Iterator[Problem]:
    """Refuse `cycle_momentum` where the optimizer has no momentum or the search chooses it: the cycle overwrites it."""
    if not scheduler.get("cycle_momentum"):
        return
    if max(extremes(scheduler["base_momentum"])) > min(extremes(scheduler["max_momentum"])):
        yield Problem(f"{place}.base_momentum", "must be at most max_momentum in every trial")
    for name, optimizer in space.optimizers.items():
        field = next((field for field in ("momentum", "beta1") if field in optimizer), None)
        if field is None:
            yield Problem(f"{place}.cycle_momentum", f"must be false, since {name} has no momentum or beta1")
        elif is_searched(optimizer[field]):
            message = f"must be false beside the searched optimizer.{name}.{field}, which it would overwrite"
            yield Problem(f"{place}.cycle_momentum", message)


def _rprop_problems(space: SearchSpace) -> Iterator[Problem]:
    """Refuse schedules and decays with Rprop, which reads the rate at its first step only."""
    for name, scheduler in space.schedulers.items():
        if name != "constant" or any(extremes(scheduler["warmup"])):
            message = "needs a constant rate, since it reads the rate at its first step only; remove "
            yield Problem("optimizer.rprop", message + (f"scheduler.{name}" if name != "constant" else "the warm-up"))
    for name, group in space.param_groups.items():
        if 0 in extremes(group["lr_ratio"]):
            yield Problem(f"param_groups.{name}.lr_ratio", "must be above 0 with rprop, got 0")


def _weight_decay_problems(space: SearchSpace) -> Iterator[Problem]:
    """Refuse weight decay, or rules of it, beside an optimizer that has none, and would not see it."""
    places = [
        f"param_groups.{name}.weight_decay" for name, g in space.param_groups.items() if g["weight_decay"] is not None
    ]
    places += ["no_weight_decay"] if space.no_weight_decay else []
    for optimizer in (name for name, domains in space.optimizers.items() if "weight_decay" not in domains):
        yield from (Problem(place, f"must be absent with {optimizer}, which has no weight decay") for place in places)
