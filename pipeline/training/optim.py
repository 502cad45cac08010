"""Torch's own optimizers and schedulers for a config, stepped together as one strategy.

The fused trainer builds the same over placeholder parameters and reads the rates from it, so schedules are PyTorch's
own in both trainers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from pipeline.space.config import TrialConfig
from pipeline.space.optimizers import OPTIMIZERS, Muon, Optimizer
from pipeline.space.schedules import (
    Constant,
    Cosine,
    CosineWarmRestarts,
    Cyclic,
    Exponential,
    Linear,
    MultiStep,
    OneCycle,
    Plateau,
    Polynomial,
    Scheduler,
    Step,
    WarmedScheduler,
)
from pipeline.space.trial import EpochMetrics

_TORCH_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    cls.name: getattr(torch.optim, cls.__name__) for cls in OPTIMIZERS.values()
}
_MUON_ARGUMENTS = ("weight_decay", "momentum", "nesterov", "ns_steps", "adjust_lr_fn")


class Strategy:
    """The optimizers and schedulers of one config; almost always one of each, Muon brings AdamW along.

    Args:
        config: Names them and gives every hyperparameter.
        parameters: Group name to (name, tensor) pairs, every group of the config; a frozen group's are not touched.
        steps_per_epoch: Optimizer updates in one epoch.
        directions: Metric name to "minimize" or "maximize"; ReduceLROnPlateau looks its own up.
        hidden_matrices: Names of the parameters that Muon takes.
    """

    def __init__(
        self,
        config: TrialConfig,
        parameters: Mapping[str, Sequence[tuple[str, Tensor]]],
        *,
        steps_per_epoch: int,
        directions: Mapping[str, str],
        hidden_matrices: frozenset[str] = frozenset(),
    ) -> None:
        self.config = config
        self.optimizers = build_optimizers(config, parameters, hidden_matrices)
        self.schedulers = [
            build_scheduler(config, optimizer, steps_per_epoch=steps_per_epoch, directions=directions)
            for optimizer in self.optimizers
        ]
        self.per_step = config.scheduler.interval == "step"

    def learning_rates(self) -> dict[str, float]:
        """Return the rate that each group's next update uses; a frozen group's is 0."""
        rates = dict.fromkeys(self.config.param_groups, 0.0)
        for optimizer in self.optimizers:
            rates.update({group["group"]: float(group["lr"]) for group in optimizer.param_groups})
        return rates

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self) -> None:
        """Update the parameters once, and move a schedule that moves every step."""
        for optimizer in self.optimizers:
            optimizer.step()
        if self.per_step:
            for scheduler in self.schedulers:
                scheduler.step()

    def end_epoch(self, metrics: Mapping[str, float]) -> None:
        """Move a schedule that moves every epoch; `metrics` are the epoch's, for ReduceLROnPlateau."""
        if self.per_step:
            return
        for scheduler in self.schedulers:
            if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
                assert isinstance(self.config.scheduler, Plateau)
                scheduler.step(metrics[self.config.scheduler.metric])
            else:
                scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every optimizer and scheduler."""
        return {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that a strategy of the same config returned."""
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for scheduler, saved in zip(self.schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(saved)


def over_placeholders(config: TrialConfig, *, steps_per_epoch: int, directions: Mapping[str, str]) -> Strategy:
    """Build a config's real optimizer and scheduler over parameters that stand for its groups, to ask for rates."""
    placeholders = {name: [(name, torch.zeros(1))] for name in config.param_groups}
    strategy = Strategy(config, placeholders, steps_per_epoch=steps_per_epoch, directions=directions)
    for optimizer in strategy.optimizers:
        optimizer.step()  # without gradients it does nothing, but a scheduler wants to have seen it
    return strategy


def replay_rates(
    config: TrialConfig, epochs: Sequence[EpochMetrics], *, directions: Mapping[str, str]
) -> tuple[EpochMetrics, ...]:
    """Return a trial's epochs with the learning rates that it used: a function of its config and metrics."""
    if not epochs:
        return ()
    steps = epochs[0].step
    strategy = over_placeholders(config, steps_per_epoch=steps, directions=directions)
    replayed = []
    for epoch in epochs:
        points: dict[str, list[tuple[int, float]]] = {name: [] for name in config.param_groups}
        for step in range(epoch.step - steps + 1, epoch.step + 1) if strategy.per_step else (epoch.step,):
            for name, rate in strategy.learning_rates().items():
                points[name].append((step, rate))
            if strategy.per_step:
                for scheduler in strategy.schedulers:
                    scheduler.step()
        strategy.end_epoch(epoch.metrics)
        lr = {name: tuple(of_group) for name, of_group in points.items()}
        replayed.append(dataclasses.replace(epoch, lr=lr))
    return tuple(replayed)


def build_optimizers(
    config: TrialConfig,
    parameters: Mapping[str, Sequence[tuple[str, Tensor]]],
    hidden_matrices: frozenset[str] = frozenset(),
) -> list[torch.optim.Optimizer]:
    """Build the config's optimizer, one torch parameter group per group that is not frozen.

    Each torch group carries its name under the key `group`. Muon is two optimizers: itself for `hidden_matrices`, and
    AdamW for the rest.
    """
    arguments = _optimizer_arguments(config.optimizer)
    if not isinstance(config.optimizer, Muon):
        groups = _torch_groups(config, parameters)
        return [_TORCH_OPTIMIZERS[config.optimizer.name](groups, **arguments)]
    hidden = {group: [p for p in some if p[0] in hidden_matrices] for group, some in parameters.items()}
    rest = {group: [p for p in some if p[0] not in hidden_matrices] for group, some in parameters.items()}
    optimizers: list[torch.optim.Optimizer] = []
    if groups := _torch_groups(config, hidden):
        optimizers.append(torch.optim.Muon(groups, **{name: arguments[name] for name in ("lr", *_MUON_ARGUMENTS)}))
    if groups := _torch_groups(config, rest):
        betas, decay = arguments["betas"], config.optimizer.weight_decay
        optimizers.append(torch.optim.AdamW(groups, lr=arguments["lr"], betas=betas, weight_decay=decay))
    return optimizers


def build_scheduler(
    config: TrialConfig, optimizer: torch.optim.Optimizer, *, steps_per_epoch: int, directions: Mapping[str, str]
) -> lr_scheduler.LRScheduler:
    """Build the config's scheduler over an optimizer, behind its warm-up if it has one.

    Counts are in the schedule's `interval`. `T_max` and `total_iters` of None run to the end of the run, and
    OneCycleLR always does.
    """
    schedule = config.scheduler
    total = config.epochs * (steps_per_epoch if schedule.interval == "step" else 1)
    warmup = schedule.warmup if isinstance(schedule, WarmedScheduler) else 0
    if not warmup:
        return _build_schedule(schedule, optimizer, total, directions)
    assert isinstance(schedule, WarmedScheduler)
    factor = schedule.warmup_start_factor
    ramp = lr_scheduler.LinearLR(optimizer, start_factor=factor, end_factor=1.0, total_iters=warmup)
    main = _build_schedule(schedule, optimizer, total - warmup, directions)
    return lr_scheduler.SequentialLR(optimizer, [ramp, main], milestones=[warmup])


def hidden_matrices(model: nn.Module) -> frozenset[str]:
    """Return the names of the parameters that Muon takes: matrices, but no embedding and not the output layer's.

    The output layer is taken to be the last matrix in order of registration.
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    matrices = [name for name, p in model.named_parameters() if p.ndim == 2 and id(p) not in embeddings]
    return frozenset(matrices[:-1])


def _torch_groups(config: TrialConfig, parameters: Mapping[str, Sequence[tuple[str, Tensor]]]) -> list[dict[str, Any]]:
    groups = []
    for name, group in config.param_groups.items():
        if group.lr_ratio == 0 or not parameters[name]:
            continue
        rate = config.optimizer.base_lr * group.lr_ratio
        torch_group: dict[str, Any] = {"group": name, "params": [p for _, p in parameters[name]], "lr": rate}
        if group.weight_decay is not None:
            torch_group["weight_decay"] = group.weight_decay
        groups.append(torch_group)
    return groups


def _optimizer_arguments(optimizer: Optimizer) -> dict[str, Any]:
    """Return an optimizer's hyperparameters as the arguments of its torch class."""
    arguments = dataclasses.asdict(optimizer)
    arguments["lr"] = arguments.pop("base_lr")
    for argument, fields in (
        ("betas", ("beta1", "beta2")),
        ("etas", ("eta_minus", "eta_plus")),
        ("step_sizes", ("step_size_min", "step_size_max")),
    ):
        if fields[0] in arguments:
            arguments[argument] = tuple(arguments.pop(field) for field in fields)
    return arguments


def _build_schedule(
    schedule: Scheduler, optimizer: torch.optim.Optimizer, total: int, directions: Mapping[str, str]
) -> lr_scheduler.LRScheduler:
    """Build one scheduler; `total` is what is left of the run in its interval."""
    peaks = [group["lr"] for group in optimizer.param_groups]
    match schedule:
        case Constant():
            return lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0)
        case Step(step_size=step_size, gamma=gamma):
            return lr_scheduler.StepLR(optimizer, step_size=step_size, gamma=gamma)
        case MultiStep(milestones=milestones, gamma=gamma):
            return lr_scheduler.MultiStepLR(optimizer, milestones=list(milestones), gamma=gamma)
        case Exponential(gamma=gamma):
            return lr_scheduler.ExponentialLR(optimizer, gamma=gamma)
        case Polynomial(total_iters=total_iters, power=power):
            return lr_scheduler.PolynomialLR(optimizer, total_iters=total_iters or total, power=power)
        case Cosine(T_max=T_max, eta_min=eta_min):
            return lr_scheduler.CosineAnnealingLR(optimizer, T_max=T_max or total, eta_min=eta_min)
        case CosineWarmRestarts(T_0=T_0, T_mult=T_mult, eta_min=eta_min):
            return lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=T_0, T_mult=T_mult, eta_min=eta_min)
        case Linear(start_factor=start_factor, end_factor=end_factor, total_iters=total_iters):
            return lr_scheduler.LinearLR(
                optimizer, start_factor=start_factor, end_factor=end_factor, total_iters=total_iters or total
            )
        case OneCycle():
            arguments = _without(schedule, "interval")
            return lr_scheduler.OneCycleLR(optimizer, max_lr=peaks, total_steps=total, **arguments)
        case Cyclic():
            arguments = _without(schedule, "interval", "max_lr_ratio")
            upper = [rate * schedule.max_lr_ratio for rate in peaks]
            return lr_scheduler.CyclicLR(optimizer, base_lr=peaks, max_lr=upper, **arguments)
        case Plateau():
            arguments = _without(schedule, "interval", "metric")
            mode = "min" if directions[schedule.metric] == "minimize" else "max"
            return lr_scheduler.ReduceLROnPlateau(optimizer, mode=mode, **arguments)  # type: ignore[arg-type]
    raise AssertionError(f"no torch scheduler for {schedule}")


def _without(schedule: Scheduler, *names: str) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(schedule).items() if name not in names}
