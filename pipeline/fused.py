"""The fast trainer: many trials as the rows of one matrix (row, parameter), equal to training each alone.

One `torch.func.vmap` runs the forward pass of all rows, so their gradients come back as a matrix of the same shape; the
optimizers are `pipeline.fused_optim`'s arithmetic on that matrix. Rates and momenta are read from real torch optimizers
and schedulers, one `Strategy` per trial over placeholder parameters.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from pipeline.config import TrialConfig
from pipeline.fused_optim import RULES, Carry, Coefficients, Rule
from pipeline.optim import Strategy
from pipeline.param_groups import assign_groups
from pipeline.plain import EVAL_BATCH, epoch_order, fork_rng, mean_loss, why_diverged
from pipeline.strategy import OPTIMIZERS
from pipeline.trainer import EpochMetrics, derive_seed
from pipeline.workloads.workload import Split, Workload


@dataclass(frozen=True)
class _Layout:
    """Where each parameter lies in a row: group after group, in a group as the model has them."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    sizes: tuple[int, ...]
    groups: Mapping[str, slice]
    """Columns of each group that is trained."""

    def views(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return each parameter of all rows, (row, *shape), as a view of the matrix."""
        parts = matrix.split(self.sizes, dim=1)
        return {name: part.view(-1, *shape) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)}


@dataclass(frozen=True)
class _Plan:
    """The coefficients of a block's epoch, on the device; see `Coefficients`."""

    rate: Tensor
    """(step, group, row, 1)"""
    direction: Tensor
    """(step, coefficient, row, 1)"""
    l2: Tensor | None
    """(step, group, row, 1), as is `shrink`."""
    shrink: Tensor | None


@dataclass
class _Block:
    """Rows that share an optimizer and its boolean options."""

    rule: Rule
    rows: slice
    states: list[Tensor]
    """Each (row, parameter)."""
    carry: Carry = field(default_factory=dict)


class FusedTrials:
    """A group of trials that train as rows of one matrix; see `TrialGroup` for the contract.

    All configs agree in everything but the strategy, and freeze the same groups.

    Args:
        configs: Trial number to what it trains; every optimizer has a rule, see `has_rule`.
        workload: Data, model, loss and metrics of all of them.
        device: Where data and matrix live.
        dtype: Of parameters and floating-point data.
        seeded: Whether the model draws random numbers, such as dropout's, and needs them seeded before each step.
    """

    def __init__(
        self,
        configs: Mapping[int, TrialConfig],
        workload: Workload,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        seeded: bool = True,
    ) -> None:
        self._seeded = seeded
        self.configs = dict(sorted(configs.items(), key=lambda item: (_block_key(item[1]), item[0])))
        self._workload = workload
        self._device = device
        self._splits: dict[str, Split] = {
            name: getattr(workload, name).to(device, dtype) for name in ("train", "val", "test")
        }
        self._epoch = 0
        self._step = 0
        self._config = next(iter(self.configs.values()))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self._config.seed, "weights"))
            self._model = workload.build_model().to(device, dtype)
        self._layout = _lay_out(self._model, self._config)
        trained = {name: p.detach() for name, p in self._model.named_parameters() if name in self._layout.names}
        row = torch.cat([trained[name].reshape(-1) for name in self._layout.names])
        rows = len(self.configs)
        self._matrix = row.repeat(rows, 1)
        self._constants = {
            name: p.detach() for name, p in self._model.named_parameters() if name not in self._layout.names
        }
        self._buffers = {
            name: b.detach().unsqueeze(0).repeat(rows, *[1] * b.ndim) for name, b in self._model.named_buffers()
        }
        self._strategies = {number: self._placeholders(config) for number, config in self.configs.items()}
        self._blocks = self._build_blocks()

    def train_epoch(self) -> dict[int, EpochMetrics]:
        """Train every trial for one epoch and evaluate it; a diverged trial has left the group."""
        if not self.configs:
            return {}
        config, train = self._config, self._splits["train"]
        steps = math.ceil(len(train) / config.batch_size)
        plans, learning_rates = self._plan_epoch(steps)
        losses: list[Tensor] = []
        sizes: list[int] = []
        self._model.train()
        with fork_rng(self._device) if self._seeded else contextlib.nullcontext():
            for number, (inputs, targets) in enumerate(self._batches()):
                if self._seeded:
                    torch.manual_seed(derive_seed(config.seed, "step", self._epoch, number))
                row_losses, gradients = self._gradients(inputs, targets)
                self._update(number, gradients, plans)
                losses.append(row_losses)
                sizes.append(len(inputs))
        self._epoch += 1
        self._step += steps
        return self._end_epoch(torch.stack(losses, dim=1).tolist(), sizes, learning_rates)

    def drop(self, number: int) -> None:
        """Stop training a trial: its row leaves the matrix."""
        self._keep([other for other in self.configs if other != number])

    def test(self) -> dict[int, dict[str, float]]:
        """Return each trial's `test/…` metrics."""
        return self._evaluate("test")

    def model_state(self, number: int) -> dict[str, Tensor]:
        """Return a trial's parameters and buffers by name, on the CPU."""
        row = list(self.configs).index(number)
        with torch.no_grad():
            parameters = dict(self._model.named_parameters())
            for name, value in self._layout.views(self._matrix).items():
                parameters[name].copy_(value[row])
            buffers = dict(self._model.named_buffers())
            for name, value in self._buffers.items():
                buffers[name].copy_(value[row])
        return {name: tensor.detach().cpu().clone() for name, tensor in self._model.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the matrix and all else that the next epoch depends on."""
        return {
            "numbers": list(self.configs),
            "epoch": self._epoch,
            "step": self._step,
            "matrix": self._matrix,
            "buffers": self._buffers,
            "blocks": [{"states": block.states, "carry": block.carry} for block in self._blocks],
            "strategies": [strategy.state_dict() for strategy in self._strategies.values()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; trials that it does not hold were dropped."""
        self._keep(state["numbers"])
        self._epoch, self._step = state["epoch"], state["step"]
        self._matrix.copy_(state["matrix"])
        for name, buffer in self._buffers.items():
            buffer.copy_(state["buffers"][name])
        for block, saved in zip(self._blocks, state["blocks"], strict=True):
            for mine, its in zip(block.states, saved["states"], strict=True):
                mine.copy_(its)
            block.carry = {name: tensor.cpu().clone() for name, tensor in saved["carry"].items()}
        for strategy, its_state in zip(self._strategies.values(), state["strategies"], strict=True):
            strategy.load_state_dict(its_state)

    def time_step(self) -> None:
        """Make the arithmetic of one step on the first batch, for whoever takes the time; changes no parameter."""
        batch = slice(0, self._config.batch_size)
        self._model.train()
        self._gradients(self._splits["train"].inputs[batch], self._splits["train"].targets[batch])

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        train = self._splits["train"]
        order = epoch_order(len(train), seed=self._config.seed, epoch=self._epoch).to(self._device)
        for indices in order.split(self._config.batch_size):
            yield train.inputs.index_select(0, indices), train.targets.index_select(0, indices)

    def _gradients(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return each row's loss (row,) and gradients (row, parameter) on one batch.

        Raises:
            RuntimeError: The loss does not depend on a parameter. PyTorch's optimizers leave such a parameter as it
                is, without weight decay and without counting the step, which a row cannot.
        """
        parameters = {name: p.detach().requires_grad_() for name, p in self._layout.views(self._matrix).items()}
        outputs = self._forward(parameters, inputs)
        losses = vmap(self._workload.loss, in_dims=(0, None), randomness="same")(outputs, targets)
        gradients = torch.autograd.grad(losses.sum(), list(parameters.values()), allow_unused=True)
        if unused := [name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None]:
            raise RuntimeError(f"the loss does not depend on {', '.join(unused)}")
        return losses.detach(), torch.cat([gradient.reshape(len(losses), -1) for gradient in gradients], dim=1)

    def _forward(self, parameters: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        """Return outputs (row, batch, …) of every row on the same inputs (batch, …)."""

        def one(parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Tensor:
            outputs: Tensor = functional_call(self._model, {**parameters, **self._constants, **buffers}, (inputs,))
            return outputs

        outputs: Tensor = vmap(one, randomness="same")(parameters, self._buffers)
        return outputs

    @torch.no_grad()
    def _update(self, step: int, gradients: Tensor, plans: Sequence[_Plan]) -> None:
        """Make one update of every row."""
        groups = self._layout.groups.values()
        for block, plan in zip(self._blocks, plans, strict=True):
            p, g = self._matrix[block.rows], gradients[block.rows]
            if plan.l2 is not None:
                for columns, l2 in zip(groups, plan.l2[step], strict=True):
                    g[:, columns].addcmul_(p[:, columns], l2)
            direction = block.rule.direction(g, block.states, plan.direction[step].unbind())
            if plan.shrink is not None:
                for columns, shrink in zip(groups, plan.shrink[step], strict=True):
                    p[:, columns].mul_(shrink)
            for columns, rate in zip(groups, plan.rate[step], strict=True):
                p[:, columns].addcmul_(direction[:, columns], rate, value=-1)

    def _plan_epoch(self, steps: int) -> tuple[list[_Plan], dict[int, dict[str, list[float]]]]:
        """Ask every trial's schedulers for the whole epoch, and turn the answers into coefficients.

        Returns:
            The plan of each block; trial number to group name to the rate of each step.
        """
        groups = list(self._layout.groups)
        settings = {number: list(self._settings(strategy, steps)) for number, strategy in self._strategies.items()}
        numbers = torch.arange(self._step + 1, self._step + steps + 1, dtype=torch.float64).view(-1, 1, 1)
        members, plans = list(self.configs), []
        for block in self._blocks:
            rows = [settings[number] for number in members[block.rows]]
            hyper = {
                name: torch.stack([_table(row, name, groups).expand(steps, -1) for row in rows], dim=1)
                for name in rows[0][0][groups[0]]
            }
            plans.append(self._to_plan(block.rule.coefficients(hyper, numbers, block.carry)))
        rates = {}
        for number, of_steps in settings.items():
            used = of_steps if len(of_steps) == steps else of_steps * steps
            rates[number] = {
                name: [step[name]["lr"] if name in step else 0.0 for step in used] for name in self._config.param_groups
            }
        return plans, rates

    def _to_plan(self, coefficients: Coefficients) -> _Plan:
        def columns(values: Tensor) -> Tensor:
            on_device = values.permute(0, 2, 1).unsqueeze(-1).to(self._matrix.dtype).contiguous()
            return on_device.to(self._device, non_blocking=True)

        rate, l2, shrink = coefficients.rate, coefficients.l2, coefficients.shrink
        alike = [values[:, :, 0].expand(rate.shape[:2]) for values in coefficients.direction]
        return _Plan(
            rate=columns(rate),
            direction=columns(torch.stack(alike, dim=-1) if alike else rate[:, :, :0]),
            l2=columns(l2) if l2 is not None and bool(l2.any()) else None,
            shrink=columns(shrink) if shrink is not None and bool((shrink != 1).any()) else None,
        )

    def _settings(self, strategy: Strategy, steps: int) -> Iterator[dict[str, dict[str, float]]]:
        """Yield group name to hyperparameters, for each step if the schedule moves every step, else once."""
        (optimizer,) = strategy.optimizers
        for _ in range(steps if strategy.per_step else 1):
            yield {group["group"]: _numbers(group, optimizer.defaults) for group in optimizer.param_groups}
            if strategy.per_step:
                for scheduler in strategy.schedulers:
                    scheduler.step()

    def _end_epoch(
        self, losses: list[list[float]], sizes: list[int], rates: Mapping[int, Mapping[str, Sequence[float]]]
    ) -> dict[int, EpochMetrics]:
        """Evaluate, move the schedules that move every epoch, and let diverged rows leave."""
        first = self._step - len(sizes) + 1
        evaluated = self._evaluate("val")
        results = {}
        for row_losses, (number, strategy) in zip(losses, self._strategies.items(), strict=True):
            metrics = {"train/loss": mean_loss(row_losses, sizes), **evaluated[number]}
            diverged = why_diverged(row_losses, metrics, first_step=first, epoch=self._epoch)
            if diverged is None:
                strategy.end_epoch(metrics)
            lr = {name: tuple(enumerate(values, start=first)) for name, values in rates[number].items()}
            if not strategy.per_step:
                lr = {name: points[-1:] for name, points in lr.items()}
            results[number] = EpochMetrics(
                epoch=self._epoch, step=self._step, metrics=metrics, lr=lr, diverged=diverged
            )
        self._keep([number for number in self.configs if results[number].diverged is None])
        return dict(sorted(results.items()))

    @torch.no_grad()
    def _evaluate(self, name: str) -> dict[int, dict[str, float]]:
        """Return each trial's loss and metrics over a split, named after it."""
        self._model.eval()
        split, parameters = self._splits[name], self._layout.views(self._matrix)
        outputs = torch.cat([self._forward(parameters, inputs) for inputs in split.inputs.split(EVAL_BATCH)], dim=1)
        measures = {"loss": self._workload.loss} | {
            m: measure.function for m, measure in self._workload.metrics.items()
        }
        values = {
            f"{name}/{measure}": [function(row, split.targets) for row in outputs]
            for measure, function in measures.items()
        }
        numbers = {measure: torch.stack(rows).tolist() for measure, rows in values.items()}
        return {
            number: {measure: rows[row] for measure, rows in numbers.items()} for row, number in enumerate(self.configs)
        }

    def _keep(self, numbers: Sequence[int]) -> None:
        """Keep the rows of these trials; what stays is copied as it is, so no row notices."""
        if len(numbers) == len(self.configs):
            return
        staying = [row for row, number in enumerate(self.configs) if number in numbers]
        index = torch.tensor(staying, dtype=torch.long, device=self._device)
        self._matrix = self._matrix[index]
        self._buffers = {name: buffer[index] for name, buffer in self._buffers.items()}
        self.configs = {n: c for n, c in self.configs.items() if n in numbers}
        self._strategies = {n: s for n, s in self._strategies.items() if n in numbers}
        blocks, start = [], 0
        for block in self._blocks:
            local = [row - block.rows.start for row in staying if block.rows.start <= row < block.rows.stop]
            if not local:
                continue
            states = [state[torch.tensor(local, device=self._device)] for state in block.states]
            carry = {name: values[local] for name, values in block.carry.items()}
            blocks.append(_Block(block.rule, slice(start, start + len(local)), states, carry))
            start += len(local)
        self._blocks = blocks

    def _placeholders(self, config: TrialConfig) -> Strategy:
        """Build a trial's real optimizer and scheduler over parameters that stand for its groups."""
        strategy = Strategy(
            config,
            {name: [(name, torch.zeros(1))] for name in config.param_groups},
            steps_per_epoch=math.ceil(len(self._splits["train"]) / config.batch_size),
            directions=self._workload.directions,
        )
        for optimizer in strategy.optimizers:
            optimizer.step()  # without gradients it does nothing, but a scheduler wants to have seen it
        return strategy

    def _build_blocks(self) -> list[_Block]:
        keys = [_block_key(config) for config in self.configs.values()]
        blocks = []
        for key in dict.fromkeys(keys):
            start, count = keys.index(key), keys.count(key)
            name, options = key
            rule = RULES[name](dict(options))
            states = [torch.zeros_like(self._matrix[:count]) for _ in rule.states]
            blocks.append(_Block(rule, slice(start, start + count), states))
        return blocks


def has_rule(optimizer: str) -> bool:
    """Say whether trials of an optimizer, by its name in a file, can be rows."""
    return OPTIMIZERS[optimizer].__name__ in RULES


def _block_key(config: TrialConfig) -> tuple[str, tuple[tuple[str, bool], ...]]:
    """Return what rows of one block have in common: the optimizer and its boolean options."""
    options = {name: value for name, value in dataclasses.asdict(config.optimizer).items() if isinstance(value, bool)}
    return type(config.optimizer).__name__, tuple(sorted(options.items()))


def _table(settings: Sequence[Mapping[str, Mapping[str, float]]], name: str, groups: Sequence[str]) -> Tensor:
    """Return one hyperparameter of one trial as (step, group), float64."""
    return torch.tensor([[of_group[group][name] for group in groups] for of_group in settings], dtype=torch.float64)


def _numbers(group: Mapping[str, Any], names: Mapping[str, Any]) -> dict[str, float]:
    """Return the optimizer's own hyperparameters, `names`, of one of torch's parameter groups as numbers."""
    values = {name: group[name] for name in names if isinstance(group[name], int | float)}
    if "betas" in names:
        values["beta1"], values["beta2"] = group["betas"]
    return {name: float(value) for name, value in values.items()}


def _lay_out(model: nn.Module, config: TrialConfig) -> _Layout:
    """Lay out the parameters that train: those of groups that are not frozen."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    patterns = {name: group.pattern for name, group in config.param_groups.items()}
    assigned, problems = assign_groups(parameters, patterns)
    assert not problems, problems
    trained = {name: names for name, names in assigned.items() if config.param_groups[name].lr_ratio != 0}
    names = [name for group in trained.values() for name in group]
    groups, start = {}, 0
    for group, members in trained.items():
        size = sum(parameters[name].numel() for name in members)
        groups[group] = slice(start, start + size)
        start += size
    shapes = tuple(parameters[name].shape for name in names)
    return _Layout(tuple(names), shapes, tuple(shape.numel() for shape in shapes), groups)
