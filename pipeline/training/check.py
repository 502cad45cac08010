"""Check optimizers and schedules of a person's own, by trying each on one example of the space."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeline.errors import Problem
from pipeline.files.code import where
from pipeline.space.config import derive_seed
from pipeline.space.own_code import FactorError, factor_of, is_own
from pipeline.space.schedules import OwnScheduler
from pipeline.training.epoch import Accumulation
from pipeline.training.optim import build_optimizers, group_parameters
from pipeline.workloads.data import epoch_length
from pipeline.workloads.random_state import seeded
from pipeline.workloads.workload import Workload

if TYPE_CHECKING:
    from pipeline.space.search_space import SearchSpace


def own_code_problems(
    space: SearchSpace, workload: Workload, model: nn.Module, *, device: torch.device
) -> Iterator[Problem]:
    """Yield the problems of a space's own optimizers and schedules.

    An optimizer makes a step on copies of the model's parameters with gradients of 0. A schedule is asked for the
    factor of every step of the run. A trial with other hyperparameters may still fail.

    Args:
        space: Names the optimizers and schedules, which have been loaded.
        workload: Says how long an epoch is.
        model: Supplies the parameters.
        device: Where the copies are, since an optimizer may support one device only.
    """
    with seeded(derive_seed(space.seed, "check"), device):
        for name in filter(is_own, space.optimizers):
            config = dataclasses.replace(space, optimizers={name: space.optimizers[name]}).example()
            groups = group_parameters(config, model)
            copies = {group: [(name, _copy(p, device)) for name, p in pairs] for group, pairs in groups.items()}
            try:
                for optimizer in build_optimizers(config, copies):
                    optimizer.step()
            except (Exception, SystemExit) as error:
                message = f"raised {where(error)}, with {_shown(config.optimizer.arguments())}"
                yield Problem(f"optimizer.{name}", message)
        for name in filter(is_own, space.schedulers):
            config = dataclasses.replace(space, schedulers={name: space.schedulers[name]}).example()
            schedule = config.scheduler
            assert isinstance(schedule, OwnScheduler)
            steps = Accumulation(config.accumulate, config.batch_size, epoch_length(workload, config.seed)).steps
            total = config.epochs * (steps if schedule.interval == "step" else 1)
            if problem := _factor_problem(schedule, total):
                given = _shown(schedule.hyperparameters)
                yield Problem(f"scheduler.{name}", f"{problem}, with {given}" if given else problem)


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
