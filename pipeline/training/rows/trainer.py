"""The fast trainer: many trials as the rows of one matrix (row, parameter), equal to training each trial alone.

One `torch.func.vmap` runs the forward pass of all rows, so the gradients are a matrix of the same shape. `update_rules`
updates the matrix with rates and momenta from real torch optimizers and schedulers: one `Strategy` per trial over
placeholder parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn import functional as F

from pipeline.space.config import TrialConfig, derive_seed
from pipeline.space.placement import Placement
from pipeline.space.trial import EpochMetrics
from pipeline.training.contract import Batches, train_epoch_of
from pipeline.training.epoch import Record, autocast, check_shapes, mean_loss, seeded_step, why_diverged
from pipeline.training.pooling import Pooling
from pipeline.training.rows.layout import lay_out
from pipeline.training.rows.model import RowModel
from pipeline.training.rows.optimizer import MatrixOptimizer, row_order
from pipeline.workloads.data import (
    evaluation_batch_size,
    evaluation_batches,
    first_samples,
    model_inputs,
    samples_of,
    training_batches,
)
from pipeline.workloads.workload import Workload

IGNORED = -100
"""Target that `F.cross_entropy` ignores by default."""


class FusedTrials:
    """A group of trials that train as rows of one matrix; see `TrialGroup` for the contract.

    All configs agree in everything but the strategy, and freeze the same groups.

    Args:
        configs: Trial number to config; every optimizer has an update rule.
        workload, device, dtype, seeded: As `PlainTrials` takes them.
    """

    plain = False
    """Whether each trial trains by itself."""

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
        self.configs = row_order(configs)
        self._workload = workload
        self._device, self._dtype = device, dtype
        self._epoch = 0
        self._step = 0
        self._config = next(iter(self.configs.values()))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self._config.seed, "weights"))
            self._model = workload.build_model().to(device, dtype)
        self._layout = lay_out(self._model, self._config)
        trained = {name: p.detach() for name, p in self._model.named_parameters() if name in self._layout.names}
        row = torch.cat([trained[name].reshape(-1) for name in self._layout.names])
        rows = len(self.configs)
        self._matrix = row.repeat(rows, 1)
        for name, parameter in self._model.named_parameters():
            parameter.requires_grad_(name in trained)
        self._buffers = {
            name: b.detach().unsqueeze(0).repeat(rows, *[1] * b.ndim) for name, b in self._model.named_buffers()
        }
        self._each_row = RowModel(
            self._model, {*trained, *self._buffers}, Pooling(device, channels_last=self._config.channels_last)
        )
        self._steps_per_epoch = math.ceil(len(workload.train) / self._config.batch_size)
        self._record = Record()
        self._rates: Mapping[int, Mapping[str, Sequence[float]]] = {}
        self._optimizer = MatrixOptimizer(
            self.configs,
            groups=self._layout.groups,
            matrix=self._matrix,
            steps_per_epoch=self._steps_per_epoch,
            directions=workload.directions,
        )

    def try_memory(self) -> None:
        """Compute a training and an evaluation batch; the state of the group does not change.

        Raises:
            torch.OutOfMemoryError: A batch does not fit into the device's memory.
        """
        buffers = {name: buffer.clone() for name, buffer in self._buffers.items()}
        for name in ("train", "val"):
            split = samples_of(self._workload, name)
            size = self._config.batch_size if name == "train" else evaluation_batch_size(split, self._config)
            batch = first_samples(split, size)
            inputs = model_inputs(self._workload, batch.inputs, self._dtype)
            if name == "train":
                _, gradients = self.gradients(inputs, batch.targets)
                _temporaries = [torch.empty_like(gradients) for _ in range(2)]  # as many as an update allocates
            else:
                self.evaluate_step(inputs, batch.targets)
        self._record, self._buffers = Record(), buffers

    def train_epoch(self) -> dict[int, EpochMetrics]:
        """Train every trial for one epoch and evaluate it; a diverged trial has left the group."""
        return train_epoch_of(self) if self.configs else {}

    def training_batches(self) -> Batches:
        """Yield the training batches of the next epoch; see `Stepwise`."""
        return training_batches(self._workload, self._config, epoch=self._epoch, device=self._device, dtype=self._dtype)

    def evaluation_batches(self, name: str) -> Batches:
        """Yield the batches of a split."""
        return evaluation_batches(self._workload, name, self._config, dtype=self._dtype)

    def begin_epoch(self) -> None:
        """Begin an epoch: compute its rates, and clear the record."""
        self._record = Record()
        self._rates = self._optimizer.plan_epoch()
        self._model.train()

    def train_step(self, inputs: Tensor, targets: Tensor) -> None:
        """Update every row on one batch."""
        self.update(*self.gradients(inputs, targets), samples=len(inputs))

    def gradients(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return each row's loss (row,) and gradients (row, parameter) on the next batch of the epoch.

        Raises:
            RuntimeError: The loss does not depend on a parameter. PyTorch's optimizers skip such a parameter, without
                weight decay and without counting the step, which a row cannot do.
        """
        parameters = {name: p.detach().requires_grad_() for name, p in self._layout.views(self._matrix).items()}
        step = len(self._record.sizes)
        with seeded_step(self._seeded, self._device, self._config.seed, "step", self._epoch, step):
            with autocast(self._config, self._device):
                losses = self._losses(inputs, targets, parameters)
            gradients = torch.autograd.grad(losses.sum(), list(parameters.values()), allow_unused=True)
        if unused := [name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None]:
            raise RuntimeError(f"the loss does not depend on {', '.join(unused)}")
        return losses.detach(), torch.cat([gradient.reshape(len(losses), -1) for gradient in gradients], dim=1)

    def update(self, losses: Tensor, gradients: Tensor, *, samples: int) -> None:
        """Update every row by its gradients (row, parameter), which are overwritten; record the losses (row,)."""
        self._optimizer.update(self._matrix, gradients, step=len(self._record.sizes))
        self._record.losses.append(losses)
        self._record.sizes.append(samples)

    @torch.no_grad()
    def evaluate_step(self, inputs: Tensor, targets: Tensor) -> None:
        """Record every row's outputs for one batch of a split."""
        record = self._record
        self._model.eval()
        parameters = self._layout.views(self._matrix)
        with (
            seeded_step(self._seeded, self._device, self._config.seed, "evaluation", self._epoch, len(record.outputs)),
            autocast(self._config, self._device),
        ):
            outputs = self._each_row(lambda model: model(inputs), parameters, self._buffers)
        record.outputs.append(outputs)
        record.targets.append(targets)

    def end_epoch(self) -> dict[int, EpochMetrics]:
        """Return the epoch's metrics, step the schedules that move every epoch, and remove diverged rows."""
        record = self._record
        first = self._step + 1
        self._epoch += 1
        self._step += len(record.sizes)
        evaluated = self._evaluated("val")
        results = {}
        threads, rows = torch.get_num_threads(), len(self.configs)
        epochs = zip(self.configs, torch.stack(record.losses, dim=1).tolist(), strict=True)
        for row, (number, losses) in enumerate(epochs):
            metrics = {"train/loss": mean_loss(losses, record.sizes), **evaluated[number]}
            diverged = why_diverged(losses, metrics, first_step=first, epoch=self._epoch)
            if diverged is None:
                self._optimizer.end_epoch(number, metrics)
            results[number] = EpochMetrics(
                epoch=self._epoch,
                step=self._step,
                metrics=metrics,
                lr=self._lr_points(number),
                placement=Placement(trainer="rows", rows=rows, place=row, threads=threads),
                diverged=diverged,
            )
        self._record = Record()
        self._keep([number for number in self.configs if results[number].diverged is None])
        return dict(sorted(results.items()))

    def drop(self, number: int) -> None:
        """Stop training a trial: remove its row from the matrix."""
        self._keep([other for other in self.configs if other != number])

    def outputs(self, name: str) -> Tensor:
        """Return the outputs of each trial's model for a split, (row, sample, …)."""
        self._record = Record()
        for inputs, targets in self.evaluation_batches(name):
            self.evaluate_step(inputs, targets)
        return torch.cat(self._record.outputs, dim=1)

    def test(self) -> dict[int, dict[str, float]]:
        """Return each trial's `test/…` metrics."""
        if not self.configs:
            return {}
        self.outputs("test")
        return self._evaluated("test")

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
        state = self._model.state_dict()
        return {name: value.detach().cpu().clone() for name, value in state.items() if isinstance(value, Tensor)}

    def state_dict(self) -> dict[str, Any]:
        """Return each trial's row and everything else that the trial's next epoch depends on."""
        matrix, optimizers = self._matrix.cpu(), self._optimizer.row_states()
        buffers = {name: buffer.cpu() for name, buffer in self._buffers.items()}
        return {
            str(number): {
                "epoch": self._epoch,
                "step": self._step,
                "row": matrix[row].clone(),
                "layout": self._layout.described(),
                "buffers": {name: buffer[row].clone() for name, buffer in buffers.items()},
                "optimizer": optimizers[number],
            }
            for row, number in enumerate(self.configs)
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state, and drop the trials that are not in the state."""
        self._keep([number for number in self.configs if str(number) in state])
        for row, number in enumerate(self.configs):
            saved = state[str(number)]
            self._check_layout(saved)
            self._epoch, self._step = saved["epoch"], saved["step"]
            self._matrix[row] = saved["row"]
            for name, buffer in self._buffers.items():
                buffer[row] = saved["buffers"][name]
            self._optimizer.load_row_state(number, saved["optimizer"], steps=self._step)

    def _check_layout(self, saved: Mapping[str, Any]) -> None:
        """Raise a ValueError if a row's state has other parameters or buffers than the model, or another order."""
        if self._layout.described() != saved["layout"]:
            raise ValueError("its parameters have other names, shapes or another order")
        check_shapes({name: buffer[0] for name, buffer in self._buffers.items()}, saved["buffers"])

    def _losses(self, inputs: Tensor, targets: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return each row's loss (row,) on one batch."""
        loss = self._workload.loss
        if loss is F.cross_entropy and targets.ndim == 1:
            outputs = self._each_row(lambda model: model(inputs), parameters, self._buffers)
            if outputs.ndim == 3:
                return cross_entropy_of_rows(outputs, targets)
            return vmap(loss, in_dims=(0, None))(outputs, targets)
        return self._each_row(lambda model: loss(model(inputs), targets), parameters, self._buffers)

    def _lr_points(self, number: int) -> dict[str, tuple[tuple[int, float], ...]]:
        """Return group name to points (step, rate) of a trial in the epoch; the rate of a frozen group is 0."""
        sizes, rates = self._record.sizes, self._rates[number]
        all_rates = {name: rates.get(name, [0.0] * len(sizes)) for name in self._config.group_names}
        first = self._step - len(sizes) + 1
        points = {name: tuple(enumerate(values, start=first)) for name, values in all_rates.items()}
        if self._optimizer.moves_every_step(number):
            return points
        return {name: group_points[-1:] for name, group_points in points.items()}

    @torch.no_grad()
    def _evaluated(self, name: str) -> dict[int, dict[str, float]]:
        """Return each trial's loss and metrics on the recorded outputs of a split, named after the split."""
        outputs, targets = torch.cat(self._record.outputs, dim=1), torch.cat(self._record.targets)
        outputs = outputs.float() if outputs.dtype == torch.bfloat16 else outputs
        values = {f"{name}/loss": [self._workload.loss(row, targets) for row in outputs]}
        # A metric may raise on the outputs of a diverged row.
        finite = torch.isfinite(outputs).flatten(1).all(dim=1).tolist()
        for metric, measure in self._workload.metrics.items():
            values[f"{name}/{metric}"] = [
                measure.function(row, targets) if is_finite else row.new_tensor(math.nan)
                for row, is_finite in zip(outputs, finite, strict=True)
            ]
        numbers = {measure: _floats(rows) for measure, rows in values.items()}
        return {
            number: {measure: rows[row] for measure, rows in numbers.items()} for row, number in enumerate(self.configs)
        }

    def _keep(self, numbers: Sequence[int]) -> None:
        """Keep only the rows of these trials; the order of rows stays."""
        if len(numbers) == len(self.configs):
            return
        staying = [row for row, number in enumerate(self.configs) if number in numbers]
        index = torch.tensor(staying, dtype=torch.long, device=self._device)
        self._matrix = self._matrix[index]
        self._buffers = {name: buffer[index] for name, buffer in self._buffers.items()}
        self._optimizer.keep(staying)
        self.configs = {n: c for n, c in self.configs.items() if n in numbers}


def cross_entropy_of_rows(logits: Tensor, targets: Tensor) -> Tensor:
    """Return `F.cross_entropy` of each row (row,), from logits (row, sample, class) and classes (sample,).

    `torch.func.vmap` would compute the loss in many small operations, which take a fifth of a small network's step.
    """
    rows, samples, _ = logits.shape
    losses = F.cross_entropy(logits.flatten(0, 1), targets.repeat(rows), reduction="none", ignore_index=IGNORED)
    return losses.view(rows, samples).sum(dim=1) / (targets != IGNORED).sum()


def _floats(values: list[Tensor]) -> list[float]:
    """Return scalar tensors as floats, in one transfer if all have the same device and type."""
    if len({(value.device, value.dtype) for value in values}) == 1:
        return [float(value) for value in torch.stack(values).tolist()]
    return [float(value) for value in values]
