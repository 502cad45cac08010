"""Build the torch optimizers and schedulers of a config, and step them together as one strategy.

The trainer of rows builds the same objects over placeholder parameters, and reads the rates from their groups.
Therefore both trainers use PyTorch's own schedules. A schedule that PyTorch lacks is a function in this module; the
schedule's `torch_class` names it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from pipeline.errors import InvalidInput
from pipeline.space import own_code
from pipeline.space.config import TrialConfig
from pipeline.space.optimizers import SGD, Muon, Optimizer, OwnOptimizer
from pipeline.space.param_groups import assign_groups
from pipeline.space.schedules import Plateau, Training, WarmedScheduler
from pipeline.space.trial import EpochMetrics


class Strategy:
    """The optimizers and schedulers of one config: one of each, or two with Muon, which needs AdamW too.

    Args:
        config: The trial's config.
        parameters: Torch group to (name, tensor) pairs, for every torch group of the config; frozen ones are skipped.
        steps_per_epoch: Optimizer updates in one epoch.
        directions: Metric name to "minimize" or "maximize", for ReduceLROnPlateau.
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
        self.torch_groups = config.torch_groups()
        self.optimizers = build_optimizers(config, parameters, hidden_matrices)
        self.schedulers = [
            build_scheduler(config, optimizer, steps_per_epoch=steps_per_epoch, directions=directions)
            for optimizer in self.optimizers
        ]
        self.per_step = config.scheduler.interval == "step"

    def learning_rates(self) -> dict[str, float]:
        """Return group name to the learning rate of the next update; the rate of a frozen group is 0."""
        rates = {group.name: 0.0 for group in self.torch_groups.values()}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                rates[self.torch_groups[group["group"]].name] = float(group["lr"])
        return rates

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters once; step the schedule if the schedule moves every step.

        Args:
            closure: Computes the loss and its gradients, for optimizers that need several evaluations.

        Returns:
            The loss that the closure returned; None without one.
        """
        first, *others = self.optimizers
        loss = first.step() if closure is None else first.step(closure)
        for optimizer in others:
            optimizer.step()
        if self.per_step:
            for scheduler in self.schedulers:
                scheduler.step()
        return loss

    def end_epoch(self, metrics: Mapping[str, float]) -> None:
        """Step the schedule if the schedule moves every epoch; ReduceLROnPlateau reads the epoch's `metrics`."""
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
        """Restore a state that a strategy of the same config returned."""
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for scheduler, saved in zip(self.schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(saved)


class ModelStrategy(Strategy):
    """The strategy of a model: its parameters in the config's groups, their gradients clipped before each step.

    Parameters of frozen groups no longer require gradients.

    Args:
        config: The trial's config.
        model: Supplies `named_parameters()`.
        steps_per_epoch: Optimizer updates in one epoch.
        directions: Metric name to "minimize" or "maximize", for ReduceLROnPlateau.

    Raises:
        InvalidInput: A pattern matches no parameter, or a parameter no pattern.
    """

    def __init__(
        self, config: TrialConfig, model: nn.Module, *, steps_per_epoch: int, directions: Mapping[str, str]
    ) -> None:
        groups = group_parameters(config, model)
        for name, group in config.torch_groups().items():
            for _, parameter in groups[name]:
                parameter.requires_grad_(group.lr_ratio != 0)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        super().__init__(
            config,
            groups,
            steps_per_epoch=steps_per_epoch,
            directions=directions,
            hidden_matrices=hidden_matrices(model),
        )

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Clip the gradients if the config says so, then update as `Strategy` does."""
        if closure is None:
            self._clip()
            return super().step()
        return super().step(functools.partial(self._evaluated, closure))

    def _evaluated(self, closure: Callable[[], Any]) -> Any:
        loss = closure()
        self._clip()
        return loss

    def _clip(self) -> None:
        if self.config.clip_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.trained, self.config.clip_grad_norm)


def over_placeholders(config: TrialConfig, *, steps_per_epoch: int, directions: Mapping[str, str]) -> Strategy:
    """Build a config's strategy over one placeholder parameter per torch group, to read learning rates from."""
    placeholders = {name: [(name, torch.zeros(1))] for name in config.torch_groups()}
    if isinstance(config.optimizer, OwnOptimizer):  # which may not take placeholders; its class decides no rate
        config = dataclasses.replace(config, optimizer=SGD(base_lr=config.optimizer.base_lr))
    strategy = Strategy(config, placeholders, steps_per_epoch=steps_per_epoch, directions=directions)
    for optimizer in strategy.optimizers:
        optimizer.step()  # changes nothing without gradients; a scheduler warns unless its optimizer has stepped
    return strategy


def replay_rates(
    config: TrialConfig, epochs: Sequence[EpochMetrics], *, directions: Mapping[str, str]
) -> tuple[EpochMetrics, ...]:
    """Return a trial's epochs with their learning rates, recomputed from the trial's config and metrics."""
    if not epochs:
        return ()
    steps = epochs[0].step
    strategy = over_placeholders(config, steps_per_epoch=steps, directions=directions)
    replayed = []
    for epoch in epochs:
        points: dict[str, list[tuple[int, float]]] = {name: [] for name in config.group_names}
        for step in range(epoch.step - steps + 1, epoch.step + 1) if strategy.per_step else (epoch.step,):
            for name, rate in strategy.learning_rates().items():
                points[name].append((step, rate))
            if strategy.per_step:
                for scheduler in strategy.schedulers:
                    scheduler.step()
        strategy.end_epoch(epoch.metrics)
        lr = {name: tuple(group_points) for name, group_points in points.items()}
        replayed.append(dataclasses.replace(epoch, lr=lr))
    return tuple(replayed)


def group_parameters(config: TrialConfig, model: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Return torch group to (name, parameter) pairs, for every torch group of the config.

    Parameters that do not require a gradient are left out.

    Raises:
        InvalidInput: A pattern matches no parameter, or a parameter no pattern.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    dims = {name: p.ndim for name, p in parameters.items()}
    assigned, problems = assign_groups(dims, config.param_groups, config.no_weight_decay)
    if problems:
        raise InvalidInput("param_groups", problems)
    return {group: [(name, parameters[name]) for name in names] for group, names in assigned.items()}


def build_optimizers(
    config: TrialConfig,
    parameters: Mapping[str, Sequence[tuple[str, Tensor]]],
    hidden_matrices: frozenset[str] = frozenset(),
) -> list[torch.optim.Optimizer]:
    """Build the config's optimizer, without frozen and empty groups.

    Each torch group carries its name under the key `group`. Muon is two optimizers: Muon for `hidden_matrices`, and
    AdamW for the rest.
    """
    if not isinstance(config.optimizer, Muon):
        return [_build_optimizer(config.optimizer, _torch_groups(config, parameters))]
    hidden = {group: [p for p in pairs if p[0] in hidden_matrices] for group, pairs in parameters.items()}
    rest = {group: [p for p in pairs if p[0] not in hidden_matrices] for group, pairs in parameters.items()}
    parts = ((config.optimizer, _torch_groups(config, hidden)), (config.optimizer.adamw(), _torch_groups(config, rest)))
    return [_build_optimizer(optimizer, groups) for optimizer, groups in parts if groups]


def build_scheduler(
    config: TrialConfig, optimizer: torch.optim.Optimizer, *, steps_per_epoch: int, directions: Mapping[str, str]
) -> lr_scheduler.LRScheduler:
    """Build the config's scheduler over an optimizer, after a warm-up if the schedule has one.

    Counts are in the schedule's `interval`, epochs or steps.
    """
    schedule = config.scheduler
    total = config.epochs * (steps_per_epoch if schedule.interval == "step" else 1)
    warmup = schedule.warmup if isinstance(schedule, WarmedScheduler) else 0
    rates = [group["lr"] for group in optimizer.param_groups]  # before the warm-up lowers them
    arguments = schedule.arguments(Training(total=total - warmup, base_lrs=rates, directions=directions))
    build = _find(schedule.torch_class, lr_scheduler)
    if not isinstance(schedule, WarmedScheduler) or not warmup:
        return build(optimizer, **arguments)  # type: ignore[no-any-return]
    ramp = lr_scheduler.LinearLR(optimizer, schedule.warmup_start_factor, end_factor=1.0, total_iters=warmup)
    return lr_scheduler.SequentialLR(optimizer, [ramp, build(optimizer, **arguments)], milestones=[warmup])


def hidden_matrices(model: nn.Module) -> frozenset[str]:
    """Return the names of the parameters that Muon updates: matrices, except embeddings and the output layer.

    The output layer is assumed to be the last matrix in order of registration.
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    matrices = [name for name, p in model.named_parameters() if p.ndim == 2 and id(p) not in embeddings]
    return frozenset(matrices[:-1])


def _torch_groups(config: TrialConfig, parameters: Mapping[str, Sequence[tuple[str, Tensor]]]) -> list[dict[str, Any]]:
    groups = []
    for name, group in config.torch_groups().items():
        if group.lr_ratio == 0 or not parameters[name]:
            continue
        rate = config.optimizer.base_lr * group.lr_ratio
        torch_group: dict[str, Any] = {"group": name, "params": [p for _, p in parameters[name]], "lr": rate}
        if group.weight_decay is not None:
            torch_group["weight_decay"] = group.weight_decay
        groups.append(torch_group)
    return groups


def _build_optimizer(optimizer: Optimizer, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    own = isinstance(optimizer, OwnOptimizer)
    build = own_code.loaded(optimizer.name) if own else _find(optimizer.torch_class, torch.optim)
    return build(groups, **optimizer.arguments())  # type: ignore[no-any-return]


def _find(name: str, module: ModuleType) -> Any:
    """Return a class of a module by its name, or any class or function by its dotted path."""
    path, _, name = name.rpartition(".")
    return getattr(importlib.import_module(path) if path else module, name)
