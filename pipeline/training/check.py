"""Check optimizers and schedules of a person's own, by trying each on one example of the space."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeline.errors import Problem
from pipeline.files.code import where
from pipeline.space.config import TrialConfig
from pipeline.space.own_code import FactorError, factor_of, is_own
from pipeline.space.param_groups import assign_groups
from pipeline.space.schedules import OwnScheduler
from pipeline.training.epoch import fork_rng
from pipeline.training.optim import build_optimizers

if TYPE_CHECKING:
    from pipeline.space.search_space import SearchSpace


def own_code_problems(
    space: SearchSpace, model: nn.Module, *, device: torch.device, steps_per_epoch: int
) -> Iterator[Problem]:
    """Yield the problems of a space's own optimizers and schedules.

    An optimizer makes a step on copies of the model's parameters with gradients of 0. A schedule is asked for the
    factor of every step of the run. A trial with other hyperparameters may still fail.

    Args:
        space: Names the optimizers and schedules, which have been loaded.
        model: Supplies the parameters.
        device: Where the copies are, since an optimizer may support one device only.
        steps_per_epoch: Optimizer updates in one epoch.
    """
    with fork_rng(device):
        for name in filter(is_own, space.optimizers):
            config = dataclasses.replace(space, optimizers={name: space.optimizers[name]}).example()
            try:
                for optimizer in build_optimizers(config, _copies(model, config, device)):
                    optimizer.step()
            except (Exception, SystemExit) as error:
                message = f"raised {where(error)}, with {_shown(config.optimizer.arguments())}"
                yield Problem(f"optimizer.{name}", message)
        for name in filter(is_own, space.schedulers):
            schedule = dataclasses.replace(space, schedulers={name: space.schedulers[name]}).example().scheduler
            assert isinstance(schedule, OwnScheduler)
            total = space.epochs * (steps_per_epoch if schedule.interval == "step" else 1)
            if problem := _factor_problem(schedule, total):
                given = _shown(schedule.hyperparameters)
                yield Problem(f"scheduler.{name}", f"{problem}, with {given}" if given else problem)


def _factor_problem(schedule: OwnScheduler, total: int) -> str | None:
    factor = factor_of(schedule.name, total=total, hyperparameters=schedule.hyperparameters)
    for step in range(total):
        try:
            factor(step)
        except FactorError as error:
            return str(error).removeprefix(f"{schedule.name} ")
        except (Exception, SystemExit) as error:
            return f"raised {where(error)}, at step {step} of {total}"
    return None


def _copies(model: nn.Module, config: TrialConfig, device: torch.device) -> Mapping[str, Sequence[tuple[str, Tensor]]]:
    """Return copies of the parameters of each group, with gradients of 0."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups, _ = assign_groups(parameters, {name: group.pattern for name, group in config.param_groups.items()})
    return {group: [(name, _copy(parameters[name], device)) for name in names] for group, names in groups.items()}


def _copy(parameter: nn.Parameter, device: torch.device) -> Tensor:
    copy = parameter.detach().to(device, copy=True).requires_grad_()
    copy.grad = torch.zeros_like(copy)
    return copy


def _shown(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in arguments.items())
