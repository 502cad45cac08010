"""Check optimizers and schedules of a person's own, by trying each on one example of the space."""

from __future__ import annotations

import dataclasses
import inspect
import io
import pickle
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeline.errors import Problem, first_line
from pipeline.files.code import where
from pipeline.space.config import TrialConfig, derive_seed
from pipeline.space.own_code import FactorError, factor_of, is_own
from pipeline.space.schedules import OwnScheduler
from pipeline.training.optim import build_optimizers, group_parameters
from pipeline.workloads.random_state import seeded
from pipeline.workloads.trees import bytes_of, leaves

if TYPE_CHECKING:
    from pipeline.space.search_space import SearchSpace

Parameters = Mapping[str, Sequence[tuple[str, Tensor]]]
"""Group name to the names and values of the parameters."""
STEPS_SAVED, STEPS_RESUMED = 2, 4
"""Steps that an optimizer makes before its state is saved, and after."""
UNLOADABLE = (pickle.PickleError, RuntimeError, TypeError, AttributeError)
"""What `torch.save` and `torch.load` raise of a value that a checkpoint cannot hold."""


def own_code_problems(
    space: SearchSpace, model: nn.Module, *, steps: Mapping[int, int], device: torch.device, closures: bool = False
) -> Iterator[Problem]:
    """Yield the problems of a space's own optimizers and schedules.

    An optimizer makes a few steps on copies of the model's parameters, is saved as in a checkpoint, and continues. A
    schedule is asked for the factor of every step of the run. A trial with other hyperparameters may still fail.

    Args:
        space: Names the optimizers and schedules, which have been loaded.
        model: Supplies the parameters.
        steps: Each batch size to the optimizer steps of an epoch.
        device: Where the copies are, since an optimizer may support one device only.
        closures: Whether training may give an optimizer a closure, as a training loop may.
    """
    with seeded(derive_seed(space.seed, "check"), device):
        for name in filter(is_own, space.optimizers):
            config = dataclasses.replace(space, optimizers={name: space.optimizers[name]}).example()
            groups = group_parameters(config, model)
            try:
                problem = _optimizer_problem(config, groups, device=device, closures=closures)
            except (Exception, SystemExit) as error:
                problem = f"raised {where(error)}, with {_shown(config.optimizer.arguments())}"
            if problem:
                yield Problem(f"optimizer.{name}", problem)
        for name in filter(is_own, space.schedulers):
            config = dataclasses.replace(space, schedulers={name: space.schedulers[name]}).example()
            schedule = config.scheduler
            assert isinstance(schedule, OwnScheduler)
            total = config.epochs * (steps[config.batch_size] if schedule.interval == "step" else 1)
            if problem := _factor_problem(schedule, total):
                given = _shown(schedule.hyperparameters)
                yield Problem(f"scheduler.{name}", f"{problem}, with {given}" if given else problem)


def _optimizer_problem(config: TrialConfig, groups: Parameters, *, device: torch.device, closures: bool) -> str | None:
    """Return why a trial with an optimizer of a person's own could not be resumed; None if it could."""
    whole = _copies(groups, device)
    (optimizer,) = build_optimizers(config, whole)
    _train(optimizer, range(STEPS_SAVED), closures=closures)
    state = optimizer.state_dict()
    try:
        saved = _as_loaded(state)
    except UNLOADABLE as error:
        held = sorted({type(leaf).__name__ for leaf in leaves(state) if not _is_loadable(leaf)})
        got = ", ".join(held) or first_line(error)
        return f"its state_dict cannot be loaded from a checkpoint; put tensors, numbers and texts into it, got {got}"
    resumed = _copies(whole, device)
    (other,) = build_optimizers(config, resumed)
    other.load_state_dict(saved)
    for each in (optimizer, other):
        _train(each, range(STEPS_SAVED, STEPS_SAVED + STEPS_RESUMED), closures=closures)
    if _values(whole) != _values(resumed):
        return "keeps state outside its state_dict, which a resumed trial lacks; put it into self.state or param_groups"
    return None


def _copies(groups: Parameters, device: torch.device) -> Parameters:
    """Return copies of parameters, of 32 bits at least: torch rounds a state that is loaded to the parameter's type."""

    def copied(parameter: Tensor) -> Tensor:
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        return parameter.detach().to(device, dtype, copy=True).requires_grad_()

    return {group: [(name, copied(p)) for name, p in pairs] for group, pairs in groups.items()}


def _values(groups: Parameters) -> list[bytes]:
    return [bytes_of(p) for pairs in groups.values() for _, p in pairs]


def _train(optimizer: torch.optim.Optimizer, steps: range, *, closures: bool) -> None:
    """Make steps with random gradients; each step has a seed of its own."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        with seeded(step, parameters[0].device):
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            _step(optimizer, closures=closures)


def _as_loaded(state: Any) -> Any:
    """Return a state as it is loaded from a checkpoint."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True, map_location="cpu")


def _is_loadable(leaf: Any) -> bool:
    try:
        _as_loaded(leaf)
    except UNLOADABLE:
        return False
    return True


def _step(optimizer: torch.optim.Optimizer, *, closures: bool) -> None:
    """Make a step; with a closure, if the optimizer, such as LBFGS, takes none without and may have one."""
    required = [p for p in inspect.signature(optimizer.step).parameters.values() if p.default is p.empty]
    if required and closures:
        optimizer.step(lambda: 0.0)
    else:
        optimizer.step()


def _factor_problem(schedule: OwnScheduler, total: int) -> str | None:
    step = 0
    try:
        factor = factor_of(schedule.name, total=total, hyperparameters=schedule.hyperparameters)
        for step in range(total):
            factor(step)
    except FactorError as error:
        return str(error).removeprefix(f"{schedule.name} ")
    except (Exception, SystemExit) as error:
        return f"raised {where(error)}, at step {step} of {total}"
    return None


def _shown(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in arguments.items())
