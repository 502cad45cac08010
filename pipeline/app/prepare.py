"""Prepare a run: load the data, choose the device, and check everything before anything is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from pipeline.app.device import choose_device, precision_problems
from pipeline.errors import DataError, InvalidInput, Problem, did_you_mean
from pipeline.files.code import where
from pipeline.space.config import Settings
from pipeline.space.load import with_layers, with_steps_per_epoch
from pipeline.space.own_code import loaded
from pipeline.space.param_groups import assign_groups
from pipeline.space.rules import length_problems
from pipeline.space.search_space import SearchSpace
from pipeline.training.check import own_code_problems
from pipeline.training.executor import LocalExecutor
from pipeline.training.loops import ask
from pipeline.training.precision import current, dtype_of
from pipeline.workloads.build import built_model
from pipeline.workloads.check import workload_problems
from pipeline.workloads.data import epoch_length, to_device
from pipeline.workloads.fingerprint import fingerprint
from pipeline.workloads.load import load_workload
from pipeline.workloads.loop import Loop
from pipeline.workloads.workload import Workload

MADE_BY_LOOPS = ("precision", "channels_last", "accumulate", "ema")
"""Settings that only trainers of this package carry out; tf32 alone is one of PyTorch's own."""


def prepare(
    space: SearchSpace,
    *,
    source: str,
    device: str,
    searching: bool,
    rows: int | None = None,
    workload: Workload | Loop | None = None,
) -> tuple[SearchSpace, LocalExecutor]:
    """Load a space's workload, choose the device, and build the executor.

    Args:
        space: The space of a search, or a config as a space of one point.
        source: Name of the space's file, for messages.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps"; "auto" is CUDA if there is a CUDA device, else the CPU.
        searching: Whether to check the objective; one that chooses the best epoch is always checked.
        rows: Most trials in a matrix; None: the trials divided by the processes, as far as memory allows.
        workload: Replaces the workload that the space names.

    Returns:
        The space with every share of the run resolved to epochs or steps, and the executor.

    Raises:
        InvalidInput: With every problem of the file for this workload, or there is no such device.
    """
    chosen = choose_device(device)
    with current(chosen):
        try:
            dtype = dtype_of(space.precision)
            workload = workload or load_workload(space.workload)
            if isinstance(workload, Loop):
                return _prepare_loop(space, workload, device=chosen, searching=searching, rows=rows)
            workload = _placed(workload, chosen, dtype)
            model = _first_model(workload, space.seed, dtype)
            space = with_layers(space, _trained_names(model))
            steps = _steps_per_epoch(space, workload)
            space = with_steps_per_epoch(space, steps)
        except InvalidInput as error:
            raise InvalidInput(source, error.problems) from None
        except DataError as error:
            raise InvalidInput(source, [Problem("workload", str(error))]) from None
        problems = [*problems_with_model(space, workload, model)]
        problems += objective_problems(space, workload) if searching or space.objective.of == "best" else ()
        problems += precision_problems(space, chosen)
        if not problems:
            problems = list(
                workload_problems(workload, batch_sizes=space.batch_sizes, device=chosen, seed=space.seed, dtype=dtype)
            )
        if not problems:
            problems = list(own_code_problems(space, model, steps=steps, device=chosen))
        if problems:
            raise InvalidInput(source, problems)
        config = dataclasses.replace(space.example(), batch_size=max(space.batch_sizes))
        processes = torch.get_num_threads()
        return space, LocalExecutor(workload, config, device=chosen, dtype=dtype, rows=rows, processes=processes)


def _prepare_loop(
    space: SearchSpace, loop: Loop, *, device: torch.device, searching: bool, rows: int | None
) -> tuple[SearchSpace, LocalExecutor]:
    """Run a training loop up to its strategy, and check the space with what it asked for.

    The loop is run once for each batch size, and once more, since it must build the same model from the same seed.

    Raises:
        InvalidInput: With every problem.
    """
    config = space.example()
    by_size = {
        size: ask(loop, dataclasses.replace(config, batch_size=size), device=device) for size in space.batch_sizes
    }
    asked, second = by_size[config.batch_size], ask(loop, config, device=device)
    if problem := _model_problem(asked.model, second.model, loop.name):
        raise InvalidInput("workload", [Problem("workload", problem)])
    loop = dataclasses.replace(loop, directions=asked.metrics)
    steps = {size: other.steps_per_epoch for size, other in by_size.items()}
    space = with_steps_per_epoch(with_layers(space, _trained_names(asked.model)), steps)
    problems = [*_strategy_problems(space, loop, asked.model, steps=steps)]
    problems += objective_problems(space, loop) if searching or space.objective.of == "best" else ()
    problems += [*precision_problems(space, device), *_loop_problems(space)]
    if not problems:
        problems = list(own_code_problems(space, asked.model, steps=steps, device=device, closures=True))
    if problems:
        raise InvalidInput("workload", problems)
    return space, LocalExecutor(loop, space.example(), device=device, rows=rows, processes=torch.get_num_threads())


def _loop_problems(space: SearchSpace) -> Iterator[Problem]:
    """Yield the settings that a training loop makes itself, and that the space has nevertheless."""
    for setting in dataclasses.fields(Settings):
        value = space.settings[setting.name]
        if setting.name in MADE_BY_LOOPS and value not in (setting.default, "tf32"):
            message = f"is what a training loop of one's own does itself, got {value}; remove it"
            yield Problem(setting.name, message)


def problems_with_model(space: SearchSpace, workload: Workload, model: nn.Module) -> Iterator[Problem]:
    """Yield the problems of a space with its model and data."""
    samples = epoch_length(workload, space.seed)
    for size in space.batch_sizes:
        if size > samples:
            yield Problem("batch_size", f"must be at most the {samples} training samples, got {size}")
        elif space.accumulate > (batches := -(-samples // size)):
            yield Problem("accumulate", f"must be at most the {batches} batches of an epoch, got {space.accumulate}")
    yield from _strategy_problems(space, workload, model, steps=_steps_per_epoch(space, workload))


def _steps_per_epoch(space: SearchSpace, workload: Workload) -> dict[int, int]:
    """Return each batch size to the optimizer steps of an epoch."""
    samples = epoch_length(workload, space.seed)
    return {size: -(-samples // (size * space.accumulate)) for size in space.batch_sizes}


def _strategy_problems(
    space: SearchSpace, workload: Workload | Loop, model: nn.Module, *, steps: Mapping[int, int]
) -> Iterator[Problem]:
    """Yield the problems of a space's groups and schedules with its model; `steps` is that of `_steps_per_epoch`."""
    dims = {name: parameter.ndim for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not dims:
        yield Problem("workload.model", "has no parameter to train")
        return
    config = space.example()
    yield from assign_groups(dims, config.param_groups, config.no_weight_decay, tied=_tied_names(model))[1]
    plateau = space.schedulers.get("plateau")
    if plateau and plateau["metric"] not in workload.directions:
        message = f"unknown metric {plateau['metric']!r}; {did_you_mean(plateau['metric'], workload.directions)}"
        yield Problem("scheduler.plateau.metric", message)
    for name in (name for name, scheduler in space.schedulers.items() if scheduler["interval"] == "step"):
        for size, count in steps.items():
            named = size if len(steps) > 1 else None
            yield from length_problems(space, name, steps_per_epoch=count, batch_size=named)


def objective_problems(space: SearchSpace, workload: Workload | Loop) -> Iterator[Problem]:
    """Yield the problems of a space's objective with its workload."""
    directions = workload.directions
    metric, direction = space.objective.metric, space.objective.direction
    if metric not in directions:
        known = [name for name in directions if name.startswith("val/")] or directions
        yield Problem("objective.metric", f"unknown metric {metric!r}; {did_you_mean(metric, known)}")
    elif direction != directions[metric]:
        yield Problem("objective.direction", f"must be {directions[metric]} for {metric}, got {direction}")


def _trained_names(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _tied_names(model: nn.Module) -> dict[str, str]:
    """Return each further name of a parameter that several modules share, and the name in `named_parameters()`."""
    listed = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    every = model.named_parameters(remove_duplicate=False)
    return {name: listed[id(p)] for name, p in every if listed.get(id(p), name) != name}


def _placed(workload: Workload, device: torch.device, dtype: torch.dtype) -> Workload:
    try:
        return to_device(workload, device=device, dtype=dtype)
    except DataError as error:
        split, _, why = str(error).partition(": ")
        raise InvalidInput("workload", [Problem(f"workload.{split}", why)]) from None


def _first_model(workload: Workload, seed: int, dtype: torch.dtype) -> torch.nn.Module:
    try:
        cpu = torch.device("cpu")
        model, second = (built_model(workload, seed=seed, device=cpu, dtype=dtype) for _ in range(2))
    except InvalidInput:
        raise
    except (Exception, SystemExit) as error:
        raise InvalidInput("workload", [Problem("workload", f"build_model raised {where(error)}")]) from None
    if problem := _model_problem(model, second, "build_model"):
        raise InvalidInput("workload", [Problem("workload", problem)])
    return model


def _model_problem(model: Any, second: Any, function: str) -> str | None:
    """Return what is wrong with a model, given a second one from the same function; None if nothing is."""
    if lazy := [name for name, p in model.named_parameters() if isinstance(p, torch.nn.UninitializedParameter)]:
        return f"{function} must return a model whose parameters exist, got the lazy {lazy[0]}; pass a batch through it"
    if {id(p) for p in model.parameters()} & {id(p) for p in second.parameters()}:
        return (
            f"{function} must make a new model each time, got the same parameters twice; build it within the function"
        )
    if broken := [name for name, p in model.named_parameters() if not bool(torch.isfinite(p).all())]:
        return f"the model begins with a NaN or an infinity in {broken[0]}; mend its weights"
    if other := _difference(model, second):
        remedy = "draw weights from the random state of torch, Python or NumPy"
        return f"{function} must give the same model from the same seed, got {other} twice otherwise; {remedy}"
    return None


def _difference(model: nn.Module, second: nn.Module) -> str | None:
    """Return the name of a parameter or buffer in which two models differ."""
    one, other = (
        {name: tensor.detach() for name, tensor in (*m.named_parameters(), *m.named_buffers())} for m in (model, second)
    )
    for name in {**one, **other}:
        if name not in one or name not in other or one[name].shape != other[name].shape:
            return name
        if not torch.equal(one[name].nan_to_num(), other[name].nan_to_num()):
            return name
    return None


def fingerprint_of(space: SearchSpace, executor: LocalExecutor) -> dict[str, str]:
    """Return each part of what a search trains, such as its code, with a text that changes with it."""
    model = executor.untrained_model(space.example())
    return fingerprint(executor.workload, model, map(loaded, space.own_code()))
