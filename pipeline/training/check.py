"""Check optimizers and schedules of a person's own, by trying each on one example of the space."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeline.errors import Problem
from pipeline.files.code import where
from pipeline.space.config import derive_seed
from pipeline.space.own_code import FactorError, factor_of, is_own
from pipeline.space.schedules import OwnScheduler
from pipeline.training.optim import build_optimizers, group_parameters
from pipeline.workloads.random_state import seeded

if TYPE_CHECKING:
    from pipeline.space.search_space import SearchSpace


def own_code_problems(
    space: SearchSpace, model: nn.Module, *, steps: Mapping[int, int], device: torch.device, closures: bool = False
) -> Iterator[Problem]:
    """Yield the problems of a space's own optimizers and schedules.

    An optimizer makes a step on copies of the model's parameters with gradients of 0. A schedule is asked for the
    factor of every step of the run. A trial with other hyperparameters may still fail.

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
            copies = {group: [(name, _copy(p, device)) for name, p in pairs] for group, pairs in groups.items()}
            try:
                for optimizer in build_optimizers(config, copies):
                    _step(optimizer, closures=closures)
            except (Exception, SystemExit) as error:
                message = f"raised {where(error)}, with {_shown(config.optimizer.arguments())}"
                yield Problem(f"optimizer.{name}", message)
        for name in filter(is_own, space.schedulers):
            config = dataclasses.replace(space, schedulers={name: space.schedulers[name]}).example()
            schedule = config.scheduler
            assert isinstance(schedule, OwnScheduler)
            total = config.epochs * (steps[config.batch_size] if schedule.interval == "step" else 1)
            if problem := _factor_problem(schedule, total):
                given = _shown(schedule.hyperparameters)
                yield Problem(f"scheduler.{name}", f"{problem}, with {given}" if given else problem)


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


def _copy(parameter: nn.Parameter, device: torch.device) -> Tensor:
    """Return a copy of a parameter with a gradient of 0."""
    copy = parameter.detach().to(device, copy=True).requires_grad_()
    copy.grad = torch.zeros_like(copy)
    return copy


def _shown(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in arguments.items())
