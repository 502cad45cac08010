"""Evaluate a split batch by batch: the loss, and metrics of each kind, for one model or for all rows of a matrix."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from pipeline.errors import first_line
from pipeline.training.epoch import floats, noted
from pipeline.workloads.random_state import seeded
from pipeline.workloads.trees import concatenate, described, map_tensors, tensors
from pipeline.workloads.workload import Metric, Workload, accuracy

KEPT_BYTES = 1 << 28
"""Most bytes of outputs that stay on the device for metrics of a whole split; more are kept on the CPU."""


class Evaluation:
    """The loss and the metrics of each row on one split, batch by batch.

    A mean over batches is weighted by their samples. Outputs are kept only if a metric needs those of the whole split.

    Args:
        workload: Supplies the metrics.
        rows: Number of rows; 1 for a model that trains plain.
    """

    def __init__(self, workload: Workload, rows: int) -> None:
        self._metrics: Mapping[str, Metric] = workload.metrics
        self._rows = rows
        self._sizes: list[int] = []
        self._means: dict[str, list[Any]] = {}
        """Name of a mean to its value for each batch, (row,)."""
        self._accumulating = {
            name: [copy.deepcopy(metric.function) for _ in range(rows)]
            for name, metric in workload.metrics.items()
            if metric.accumulates
        }
        for metrics in self._accumulating.values():
            for metric in metrics:
                metric.reset()
        self._keeps = any(metric.keeps_outputs for metric in workload.metrics.values())
        self._kept: list[tuple[Any, Any]] = []
        self._kept_bytes = 0

    @property
    def batches(self) -> int:
        """Number of batches so far."""
        return len(self._sizes)

    @property
    def needs_outputs(self) -> bool:
        """Whether `add` takes outputs: there is a metric besides the loss."""
        return bool(self._metrics)

    def add(self, losses: Tensor, outputs: Any, targets: Any, *, size: int) -> None:
        """Add a batch.

        Args:
            losses: (row,)
            outputs: Tree of tensors (row, sample, …).
            targets: The batch's targets.
            size: Number of samples.
        """
        self._sizes.append(size)
        self._means.setdefault("loss", []).append(noted(losses))
        by_row: dict[int, Any] = {}
        for name, metric in self._metrics.items():
            if metric.function is accuracy and isinstance(outputs, Tensor):
                self._means.setdefault(name, []).append(noted(_accuracies(outputs, targets)))
            elif not metric.keeps_outputs:
                by_row = by_row or _finite_rows(outputs, losses)
                self._add_by_row(name, metric, by_row, targets)
        if self._keeps:
            self._keep(outputs, targets)

    def results(self, split: str) -> list[dict[str, float]]:
        """Return each row's loss and metrics, named after the split; where the loss is not finite, metrics are NaN."""
        shares = [size / sum(self._sizes) for size in self._sizes]
        columns = {name: _weighted(values, shares) for name, values in self._means.items()}
        rows = [row for row, loss in enumerate(columns["loss"]) if math.isfinite(loss)]
        kept = self._whole_split() if self._keeps and rows else None
        for name in self._metrics:
            measured = {row: self._measured(name, row, kept, columns) for row in rows}
            numbers = dict(zip(measured, _floats(list(measured.values())), strict=True))
            columns[name] = [numbers.get(row, math.nan) for row in range(self._rows)]
        names = ("loss", *self._metrics)
        return [{f"{split}/{name}": columns[name][row] for name in names} for row in range(self._rows)]

    def _measured(self, name: str, row: int, kept: Any, columns: Mapping[str, Sequence[float]]) -> Any:
        """Return a metric of a row's whole split, given the `kept` outputs and targets, and the means in `columns`."""
        metric = self._metrics[name]
        if not (metric.accumulates or metric.keeps_outputs):
            return columns[name][row]
        with seeded(0):  # a metric may draw random numbers, the same for each row
            if metric.accumulates:
                return self._accumulating[name][row].compute()
            return metric.function(_row(kept[0], row), kept[1])

    def _add_by_row(self, name: str, metric: Metric, outputs: Mapping[int, Any], targets: Any) -> None:
        values = [math.nan] * self._rows
        for row, own in outputs.items():
            with seeded(self.batches):
                if metric.accumulates:
                    self._accumulating[name][row].update(own, targets)
                else:
                    values[row] = float(metric.function(own, targets))
        if not metric.accumulates:
            self._means.setdefault(name, []).append(values)

    def _keep(self, outputs: Any, targets: Any) -> None:
        self._kept_bytes += sum(tensor.nbytes for tensor in tensors(outputs))
        self._kept.append((outputs, targets))
        if self._kept_bytes > KEPT_BYTES:
            self._kept = [map_tensors(Tensor.cpu, kept) for kept in self._kept]

    def _whole_split(self) -> tuple[Any, Any]:
        """Return the outputs, (row, sample, …), and the targets of the whole split."""
        outputs, targets = zip(*self._kept, strict=True)
        try:
            return concatenate(outputs, axis=1), concatenate(targets)
        except (RuntimeError, ValueError) as error:
            names = ", ".join(name for name, metric in self._metrics.items() if metric.keeps_outputs)
            some = f"outputs {described(outputs[0])} and {described(outputs[-1])}"
            message = f"{names} measures a whole split, whose batches cannot be joined: {some}, {first_line(error)}"
            raise ValueError(f"{message}; give the metric per_batch=True, or update, compute and reset") from None


class MeanWeights:
    """The mean of the weights after each optimizer step of an epoch, and its evaluation.

    At a rate that is still high, the last weights are a noisy point around it: Izmailov et al. (2018),
    https://arxiv.org/abs/1803.05407. The statistics of BatchNorm are those of the last weights.

    Args:
        evaluation: Takes what the mean gives on the batches of a split.
    """

    def __init__(self, evaluation: Evaluation) -> None:
        self.evaluation = evaluation
        self.weights: list[Tensor] = []
        """The mean so far, tensors as `add` takes them; empty before the first step."""
        self._steps = 0

    @torch.no_grad()
    def add(self, weights: Sequence[Tensor]) -> None:
        """Add the weights after a step."""
        self._steps += 1
        if not self.weights:
            self.weights = [weight.clone() for weight in weights]
        for mean, weight in zip(self.weights, weights, strict=True):
            mean.lerp_(weight, 1 / self._steps)


def _finite_rows(outputs: Any, losses: Tensor) -> dict[int, Any]:
    """Return row to outputs, for the rows whose loss is finite: a metric may raise on the outputs of others."""
    return {row: _row(outputs, row) for row, is_finite in enumerate(torch.isfinite(losses).tolist()) if is_finite}


def _row(outputs: Any, row: int) -> Any:
    """Return the outputs of a row."""
    return map_tensors(lambda leaf: leaf[row], outputs)


def _floats(values: Sequence[Any]) -> list[float]:
    """Return scalars as floats, tensors of one device and type in one transfer."""
    kinds = {(value.device, value.dtype) if isinstance(value, Tensor) else None for value in values}
    if len(kinds) == 1 and None not in kinds:
        return [float(value) for value in torch.stack(tuple(values)).tolist()]
    return [float(value) for value in values]


def _accuracies(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return each row's accuracy (row,), from outputs (row, sample, class) and targets (sample,)."""
    if outputs.shape[1:-1] == targets.shape:  # as `accuracy`, without the time that `vmap` takes
        hits = (outputs.argmax(dim=-1) == targets).flatten(1)
        return hits.to(torch.float32 if hits.device.type == "mps" else torch.float64).mean(dim=1)
    values: Tensor = vmap(accuracy, in_dims=(0, None))(outputs, targets)
    return values


def _weighted(batches: Sequence[Any], shares: Sequence[float]) -> list[float]:
    """Return each row's mean over batches, from values (row,) of each batch and the batch's share of the samples."""
    rows = zip(*floats(batches), strict=True)
    return [sum(share * value for share, value in zip(shares, row, strict=True)) for row in rows]
