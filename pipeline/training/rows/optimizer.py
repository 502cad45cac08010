"""The optimizers and schedulers of all rows of a matrix: torch objects give the rates, update rules move the rows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeline.space.config import TrialConfig
from pipeline.training.optim import Strategy, over_placeholders
from pipeline.training.rows.update_rules import RULES, Carry, Coefficients, Rule

CLIP_EPS = 1e-6
"""Added to a norm before dividing, as in `torch.nn.utils.clip_grad_norm_`."""


Shapes = tuple[tuple[tuple[str, torch.Size], ...], ...]
"""For each block, names of fields of `Coefficients` and their shapes in one step."""


@dataclass
class _Block:
    """Rows that share an optimizer and its boolean options."""

    rule: Rule
    rows: slice
    states: list[Tensor]
    """Each (row, parameter)."""
    carry: Carry = field(default_factory=dict)


class MatrixOptimizer:
    """Updates a matrix with one trial per row; each trial has its own optimizer and schedule.

    Rates and scheduled momenta come from one `Strategy` per trial over placeholder parameters.

    Args:
        configs: Trial number to config, in the order of `row_order`.
        groups: Name to columns of each trained torch group.
        matrix: (row, parameter); gives shape, dtype and device.
        steps_per_epoch: Updates in one epoch.
        directions: Metric name to "minimize" or "maximize".
    """

    def __init__(
        self,
        configs: Mapping[int, TrialConfig],
        *,
        groups: Mapping[str, slice],
        matrix: Tensor,
        steps_per_epoch: int,
        directions: Mapping[str, str],
    ) -> None:
        self._groups = groups
        self._steps_per_epoch = steps_per_epoch
        self._steps = 0
        self._device, self._dtype = matrix.device, matrix.dtype
        self._strategies = {
            number: over_placeholders(config, steps_per_epoch=steps_per_epoch, directions=directions)
            for number, config in configs.items()
        }
        self._blocks = _build_blocks(list(configs.values()), matrix)
        limits = [math.inf if config.clip_grad_norm is None else config.clip_grad_norm for config in configs.values()]
        self._clips = any(map(math.isfinite, limits))
        self._norm_limits = torch.tensor(limits, device=self._device, dtype=self._dtype).unsqueeze(1)
        self.shapes: Shapes = ()
        """What a step's coefficients consist of, in the planned epoch."""
        self._table = self._norm_limits
        """The coefficients of the planned epoch (step, coefficient), on the device."""

    def plan_epoch(self) -> dict[int, dict[str, list[float]]]:
        """Read the rates of a whole epoch from every trial's schedulers, and compute the coefficients.

        Returns:
            Trial number to group name, as rates are recorded, to the rate of each step, without frozen groups.
        """
        steps = self._steps_per_epoch
        settings = {number: list(self._settings(strategy)) for number, strategy in self._strategies.items()}
        numbers = torch.arange(self._steps + 1, self._steps + steps + 1, dtype=torch.float64).view(-1, 1, 1)
        names, members = list(self._groups), list(settings)
        plans: list[dict[str, Tensor]] = []
        for block in self._blocks:
            rows = [settings[number] for number in members[block.rows]]
            hyper = {name: _table(rows, name, names, steps) for name in rows[0][0][names[0]]}
            plans.append(_plan(block.rule.coefficients(hyper, numbers, block.carry)))
        self.shapes = tuple(tuple((name, values.shape[1:]) for name, values in plan.items()) for plan in plans)
        table = torch.cat([values.flatten(1) for plan in plans for values in plan.values()], dim=1)
        self._table = table.to(self._dtype).to(self._device, non_blocking=True)
        self._steps += steps
        recorded = {name: group.name for name, group in self._strategies[members[0]].torch_groups.items()}
        return {
            number: {recorded[name]: [values[name]["lr"] for values in _each_step(row, steps)] for name in names}
            for number, row in settings.items()
        }

    def coefficients(self, step: int) -> Tensor:
        """Return the coefficients (coefficient,) of a step of the planned epoch, counted from 0."""
        return self._table[step]

    @torch.no_grad()
    def update(self, matrix: Tensor, gradients: Tensor, coefficients: Tensor) -> None:
        """Update every row in place.

        Args:
            matrix: (row, parameter)
            gradients: (row, parameter); overwritten.
            coefficients: Of the step, (coefficient,).
        """
        groups = self._groups.values()
        if self._clips:
            norms = torch.linalg.vector_norm(gradients, dim=1, keepdim=True)
            factors = (self._norm_limits / (norms + CLIP_EPS)).clamp_(max=1.0)
            # Without a limit the factor is inf / norm, which is NaN if the norm overflows.
            gradients.mul_(factors.masked_fill_(self._norm_limits.isinf(), 1.0))
        parts = iter(coefficients.split([shape.numel() for shapes in self.shapes for _, shape in shapes]))
        for block, shapes in zip(self._blocks, self.shapes, strict=True):
            p, g = matrix[block.rows], gradients[block.rows]
            plan = {name: next(parts).view(shape).unbind() for name, shape in shapes}
            if "l2" in plan:
                for columns, l2 in zip(groups, plan["l2"], strict=True):
                    g[:, columns].addcmul_(p[:, columns], l2)
            direction = block.rule.direction(g, block.states, plan["direction"])
            if "shrink" in plan:
                for columns, shrink in zip(groups, plan["shrink"], strict=True):
                    p[:, columns].mul_(shrink)
            for columns, rate in zip(groups, plan["rate"], strict=True):
                p[:, columns].addcmul_(direction[:, columns], rate, value=-1)

    def end_epoch(self, number: int, metrics: Mapping[str, float]) -> None:
        """Step a trial's schedule if the schedule moves every epoch."""
        self._strategies[number].end_epoch(metrics)

    def moves_every_step(self, number: int) -> bool:
        """Return whether a trial's schedule moves every step."""
        return self._strategies[number].per_step

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows, which are in ascending order."""
        members = list(self._strategies)
        self._strategies = {members[row]: self._strategies[members[row]] for row in rows}
        self._norm_limits = self._norm_limits[torch.tensor(list(rows), dtype=torch.long, device=self._device)]
        blocks, start = [], 0
        for block in self._blocks:
            local = [row - block.rows.start for row in rows if block.rows.start <= row < block.rows.stop]
            if not local:
                continue
            states = [state[torch.tensor(local, device=self._device)] for state in block.states]
            carry = {name: values[local] for name, values in block.carry.items()}
            blocks.append(_Block(block.rule, slice(start, start + len(local)), states, carry))
            start += len(local)
        self._blocks = blocks

    def row_states(self) -> dict[int, dict[str, Any]]:
        """Return the state of each trial's optimizer and scheduler."""
        members, row_states = list(self._strategies), {}
        for block in self._blocks:
            states = [state.cpu() for state in block.states]
            for row, number in enumerate(members[block.rows]):
                row_states[number] = {
                    "states": [state[row].clone() for state in states],
                    "carry": {name: values[row].clone() for name, values in block.carry.items()},
                    "strategy": self._strategies[number].state_dict(),
                }
        return row_states

    def load_row_state(self, number: int, saved: Mapping[str, Any], *, steps: int) -> None:
        """Continue from one trial's state after `steps` updates, the same number for every trial of the matrix."""
        block, row = self._locate(number)
        self._steps = steps
        for state, saved_row in zip(block.states, saved["states"], strict=True):
            state[row] = saved_row
        rows = block.rows.stop - block.rows.start
        for name, saved_row in saved["carry"].items():
            block.carry.setdefault(name, saved_row.cpu().repeat(rows, 1))[row] = saved_row
        self._strategies[number].load_state_dict(saved["strategy"])

    def _locate(self, number: int) -> tuple[_Block, int]:
        """Return a trial's block, and the trial's row within the block."""
        row = list(self._strategies).index(number)
        block = next(block for block in self._blocks if block.rows.start <= row < block.rows.stop)
        return block, row - block.rows.start

    def _settings(self, strategy: Strategy) -> Iterator[dict[str, dict[str, float]]]:
        """Yield group name to hyperparameters: for each step if the schedule moves every step, else once."""
        (optimizer,) = strategy.optimizers
        for _ in range(self._steps_per_epoch if strategy.per_step else 1):
            yield {group["group"]: _numbers(group, optimizer.defaults) for group in optimizer.param_groups}
            if strategy.per_step:
                for scheduler in strategy.schedulers:
                    scheduler.step()


def _plan(coefficients: Coefficients) -> dict[str, Tensor]:
    """Return the coefficients of an epoch of a block, each (step, group or coefficient, row, 1), on the CPU."""
    rate, l2, shrink = coefficients.rate, coefficients.l2, coefficients.shrink
    direction = [values[:, :, 0].expand(rate.shape[:2]) for values in coefficients.direction]  # equal in all groups
    plan = {"rate": rate, "direction": torch.stack(direction, dim=-1) if direction else rate[:, :, :0]}
    if l2 is not None and bool(l2.any()):
        plan["l2"] = l2
    if shrink is not None and bool((shrink != 1).any()):
        plan["shrink"] = shrink
    return {name: values.permute(0, 2, 1).unsqueeze(-1) for name, values in plan.items()}


def row_order(configs: Mapping[int, TrialConfig]) -> dict[int, TrialConfig]:
    """Return trials in the order of rows: by optimizer, then by number."""
    return dict(sorted(configs.items(), key=lambda item: (_block_key(item[1]), item[0])))


def _block_key(config: TrialConfig) -> tuple[str, tuple[tuple[str, bool], ...]]:
    """Return the optimizer and its boolean options, which the rows of a block share."""
    options = {name: value for name, value in dataclasses.asdict(config.optimizer).items() if isinstance(value, bool)}
    return type(config.optimizer).__name__, tuple(sorted(options.items()))


def _build_blocks(configs: Sequence[TrialConfig], matrix: Tensor) -> list[_Block]:
    keys = [_block_key(config) for config in configs]
    blocks = []
    for key in dict.fromkeys(keys):
        start, count = keys.index(key), keys.count(key)
        name, options = key
        rule = RULES[name](dict(options))
        states = [torch.zeros_like(matrix[:count]) for _ in rule.states]
        blocks.append(_Block(rule, slice(start, start + count), states))
    return blocks


def _each_step(settings: list[dict[str, dict[str, float]]], steps: int) -> list[dict[str, dict[str, float]]]:
    return settings if len(settings) == steps else settings * steps


def _table(rows: Sequence[list[dict[str, dict[str, float]]]], name: str, groups: Sequence[str], steps: int) -> Tensor:
    """Return a hyperparameter of some rows as (step, row, group), float64."""
    if all(len(row) == 1 for row in rows):
        steady = [[row[0][group][name] for group in groups] for row in rows]
        return torch.tensor(steady, dtype=torch.float64).expand(steps, -1, -1)
    values = [[[at[group][name] for group in groups] for at in _each_step(row, steps)] for row in rows]
    return torch.tensor(values, dtype=torch.float64).transpose(0, 1)


def _numbers(group: Mapping[str, Any], names: Mapping[str, Any]) -> dict[str, float]:
    """Return the hyperparameters `names` of a torch parameter group as floats."""
    values = {name: group[name] for name in names if isinstance(group[name], int | float)}
    if "betas" in names:
        values["beta1"], values["beta2"] = group["betas"]
    return {name: float(value) for name, value in values.items()}
