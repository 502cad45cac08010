"""The fast trainer: many trials as the rows of one matrix (row, parameter), equal to training each trial alone.

One `torch.func.vmap` runs the forward pass of all rows, so the gradients are a matrix of the same shape. `update_rules`
updates the matrix with rates and momenta from real torch optimizers and schedulers: one `Strategy` per trial over
placeholder parameters.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F

from pipeline.space.config import TrialConfig
from pipeline.space.placement import Placement
from pipeline.space.trial import EpochMetrics
from pipeline.training.contract import Batches, train_epoch_of
from pipeline.training.epoch import (
    Accumulation,
    Record,
    autocast,
    check_shapes,
    floats,
    loss_of,
    mean_loss,
    noted,
    seeded_step,
    why_diverged,
    without_bf16,
)
from pipeline.training.evaluation import Evaluation, MeanWeights
from pipeline.training.pooling import Pooling
from pipeline.training.rows.captured import Capture, Captured
from pipeline.training.rows.layout import lay_out
from pipeline.training.rows.model import RowModel
from pipeline.training.rows.optimizer import MatrixOptimizer, row_order
from pipeline.workloads.build import built_model, run_model
from pipeline.workloads.data import (
    epoch_length,
    evaluation_batch_size,
    evaluation_batches,
    first_batch,
    model_batch,
    samples_of,
    training_batches,
)
from pipeline.workloads.random_state import KINDS
from pipeline.workloads.trees import map_tensors
from pipeline.workloads.workload import Batch, Workload

IGNORED = -100
"""Target that `F.cross_entropy` ignores by default."""


class FusedTrials:
    """A group of trials that train as rows of one matrix; see `TrialGroup` for the contract.

    All configs agree in everything but the strategy, and freeze the same groups.

    Args:
        configs: Trial number to config; every optimizer has an update rule.
        workload, device, dtype, draws, output_size: As `PlainTrials` takes them.
        capture: Captures steps, so that a device runs a step as a whole; None: steps run operation by operation.
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
        draws: Collection[str] = KINDS,
        output_size: int = 0,
        capture: Capture | None = None,
    ) -> None:
        self._draws = {*draws, "torch"}  # seeding torch costs little, and a model may draw later than the probe looked
        self._output_size = output_size
        self.configs = row_order(configs)
        self._workload = workload
        self._device, self._dtype = device, dtype
        self._epoch = 0
        self._step = 0
        self._config = next(iter(self.configs.values()))
        self._model = built_model(workload, seed=self._config.seed, device=device, dtype=dtype)
        self._layout = lay_out(self._model, self._config)
        trained = {name: p.detach() for name, p in self._model.named_parameters() if name in self._layout.names}
        if other := next((name for name, p in trained.items() if p.dtype != dtype), None):
            raise TypeError(f"the parameter {other} is {trained[other].dtype}, and a row is {dtype}")
        row = torch.cat([trained[name].reshape(-1) for name in self._layout.names])
        rows = len(self.configs)
        self._matrix = row.repeat(rows, 1)
        for name, parameter in self._model.named_parameters():
            parameter.requires_grad_(name in trained)
        self._buffers = {
            name: b.detach().unsqueeze(0).repeat(rows, *[1] * b.ndim) for name, b in self._model.named_buffers()
        }
        self._each_row = RowModel(
            self._model, {*trained, *self._buffers}, Pooling(device, channels_last=self._config.channels_last), device
        )
        self._accumulation = Accumulation(
            self._config.accumulate, self._config.batch_size, epoch_length(workload, self._config.seed)
        )
        self._accumulated: Tensor | None = None
        """Gradients (row, parameter) of the batches of a step so far."""
        self._averages: Tensor | None = None
        """With `ema`, averages of the parameters (row, parameter); None before the first step."""
        self._record = Record()
        self._evaluation = Evaluation(workload, rows)
        self._mean: MeanWeights | None = None
        """In an epoch after which trials are ranked."""
        self._rates: Mapping[int, Mapping[str, Sequence[float]]] = {}
        self._optimizer = MatrixOptimizer(
            self.configs,
            groups=self._layout.groups,
            matrix=self._matrix,
            steps_per_epoch=self._accumulation.steps,
            directions=workload.directions,
        )
        self._training, self._evaluating = Captured(device, capture), Captured(device, capture)

    @property
    def eager_because(self) -> str | None:
        """Why steps run operation by operation although they were to be captured; None: they run as graphs."""
        return self._training.eager_because or self._evaluating.eager_because

    def try_memory(self) -> None:
        """Compute a training and an evaluation batch; the state of the group does not change.

        Raises:
            torch.OutOfMemoryError: A batch does not fit into the device's memory.
        """
        buffers = {name: buffer.clone() for name, buffer in self._buffers.items()}
        train, val = (samples_of(self._workload, name) for name in ("train", "val"))
        batch = model_batch(self._workload, first_batch(train, self._config.batch_size), self._dtype)
        with self._seeded("step", 0):
            _, gradients = self.gradients(batch)
        _temporaries = [torch.empty_like(gradients) for _ in range(3)]  # an update allocates two, a mean one
        size = evaluation_batch_size(val, self._config, output_size=self._output_size)
        self.evaluate_step(model_batch(self._workload, first_batch(val, size), self._dtype))
        self._record, self._buffers = Record(), buffers
        self._evaluating.clear()
        self._evaluation = Evaluation(self._workload, len(self.configs))

    def train_epoch(self, *, average: bool = False) -> dict[int, EpochMetrics]:
        """Train every trial for one epoch and evaluate it; a diverged trial has left the group."""
        return train_epoch_of(self, average=average) if self.configs else {}

    def training_batches(self) -> Batches:
        """Yield the training batches of the next epoch; see `Stepwise`."""
        return training_batches(self._workload, self._config, epoch=self._epoch, device=self._device, dtype=self._dtype)

    def evaluation_batches(self, name: str) -> Batches:
        """Yield the batches of a split."""
        return evaluation_batches(self._workload, name, self._config, dtype=self._dtype, output_size=self._output_size)

    def begin_epoch(self, *, average: bool = False) -> None:
        """Begin an epoch: compute its rates, and clear the record."""
        self._record = Record()
        self._evaluation = Evaluation(self._workload, len(self.configs))
        averages = average and self._config.ema is None  # with `ema` the metrics are of averages anyway
        self._mean = MeanWeights(Evaluation(self._workload, len(self.configs))) if averages else None
        self._rates = self._optimizer.plan_epoch()
        self._model.train()

    def train_step(self, batch: Batch) -> None:
        """Update every row on one batch."""
        number, accumulate = len(self._record.sizes), self._config.accumulate
        coefficients = self._optimizer.coefficients(number) if accumulate == 1 else None
        arguments = (batch.inputs, None if batch.targets is batch.inputs else batch.targets, coefficients)
        with self._seeded("step", number):
            key = None if coefficients is None else self._optimizer.shapes
            losses, gradients = self._training(self._train_on, arguments, key=key)
        if accumulate > 1:
            self._accumulate(gradients, number)
        if self._accumulation.ends(number):
            self._average()
        self._record.losses.append(noted(losses))
        self._record.sizes.append(batch.size)

    def _train_on(self, arguments: tuple[Any, Any, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        """Update every row on (inputs, targets, coefficients); return the losses (row,).

        Without targets the inputs are the targets. Without coefficients no row is updated, and the gradients
        (row, parameter) are returned too.
        """
        inputs, targets, coefficients = arguments
        losses, gradients = self.gradients(Batch(inputs, inputs if targets is None else targets, 0))
        if coefficients is None:
            return losses, gradients
        self._optimizer.update(self._matrix, gradients, coefficients)
        return losses, None

    def gradients(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return each row's loss (row,) and gradients (row, parameter) on a batch.

        Raises:
            RuntimeError: The loss does not depend on a parameter. PyTorch's optimizers skip such a parameter, without
                weight decay and without counting the step, which a row cannot do.
        """
        parameters = {name: p.detach().requires_grad_() for name, p in self._layout.views(self._matrix).items()}
        with autocast(self._config, self._device):
            losses, _ = self._losses(batch, parameters)
        gradients = torch.autograd.grad(losses.sum(), list(parameters.values()), allow_unused=True)
        if unused := [name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None]:
            raise RuntimeError(f"the loss does not depend on {', '.join(unused)}")
        return losses.detach(), torch.cat([gradient.reshape(len(losses), -1) for gradient in gradients], dim=1)

    def _accumulate(self, gradients: Tensor, number: int) -> None:
        """Add the gradients of a batch, which are overwritten, and update every row after the last batch of a step."""
        gradients.mul_(self._accumulation.share(number))
        gradients = gradients if self._accumulated is None else self._accumulated.add_(gradients)
        self._accumulated = None if self._accumulation.ends(number) else gradients
        if self._accumulation.ends(number):
            step = number // self._config.accumulate
            self._optimizer.update(self._matrix, gradients, self._optimizer.coefficients(step))

    def _seeded(self, purpose: str, number: int) -> contextlib.AbstractContextManager[None]:
        """Return a context that seeds random states for a step or an evaluated batch of the present epoch."""
        return seeded_step(self._draws, self._device, self._config.seed, purpose, self._epoch, number)

    def _average(self) -> None:
        """Add the weights after a step to the averages that there are."""
        if self._mean is not None:
            self._mean.add([self._matrix])
        if self._config.ema is None:
            return
        if self._averages is None:
            self._averages = self._matrix.clone()
        else:
            self._averages.lerp_(self._matrix, 1 - self._config.ema)

    @property
    def _evaluated(self) -> Tensor:
        """The parameters (row, parameter) that are evaluated and saved."""
        return self._matrix if self._averages is None else self._averages

    @torch.no_grad()
    def evaluate_step(self, batch: Batch) -> None:
        """Evaluate every row on one batch of a split."""
        arguments = (batch.inputs, None if batch.targets is batch.inputs else batch.targets)
        self._model.eval()
        if self._mean is not None:
            with self._seeded("evaluation", self._mean.evaluation.batches):
                inputs, targets = (map_tensors(torch.clone, part) for part in arguments)
                losses, outputs = self._evaluate_on(self._mean.weights[0], (inputs, targets))
                self._mean.evaluation.add(losses, outputs, batch.targets, size=batch.size)
        matrix = self._evaluated
        with self._seeded("evaluation", self._evaluation.batches):
            evaluate = functools.partial(self._evaluate_on, matrix)
            losses, outputs = self._evaluating(evaluate, arguments, key=id(matrix))
            self._evaluation.add(losses, outputs, batch.targets, size=batch.size)

    def _evaluate_on(self, matrix: Tensor, arguments: tuple[Any, Any]) -> tuple[Tensor, Any]:
        """Return each row's loss (row,) and outputs on (inputs, targets), with the parameters (row, parameter).

        Without targets the inputs are the targets.
        """
        inputs, targets = arguments
        batch = Batch(inputs, inputs if targets is None else targets, 0)
        return self._losses(batch, self._layout.views(matrix), evaluating=True)

    def end_epoch(self) -> dict[int, EpochMetrics]:
        """Return the epoch's metrics, step the schedules that move every epoch, and remove diverged rows."""
        record = self._record
        first, accumulate = self._step + 1, self._config.accumulate
        self._epoch += 1
        self._step += self._accumulation.steps
        evaluated = self._evaluation.results("val")
        averaged = [{}] * len(self.configs) if self._mean is None else self._mean.evaluation.results("val")
        results = {}
        threads, rows = torch.get_num_threads(), len(self.configs)
        epochs = zip(self.configs, zip(*floats(record.losses), strict=True), strict=True)
        for row, (number, losses) in enumerate(epochs):
            metrics = {"train/loss": mean_loss(losses, record.sizes), **evaluated[row]}
            diverged = why_diverged(losses, metrics, first_step=first, accumulate=accumulate, epoch=self._epoch)
            if diverged is None:
                self._optimizer.end_epoch(number, metrics)
            results[number] = EpochMetrics(
                epoch=self._epoch,
                step=self._step,
                metrics=metrics,
                averaged=averaged[row],
                lr=self._lr_points(number),
                placement=Placement(trainer="rows", rows=rows, place=row, threads=threads),
                diverged=diverged,
            )
        self._record, self._mean = Record(), None
        self._keep([number for number in self.configs if results[number].diverged is None])
        return dict(sorted(results.items()))

    def drop(self, number: int) -> None:
        """Stop training a trial: remove its row from the matrix."""
        self._keep([other for other in self.configs if other != number])

    def test(self) -> dict[int, dict[str, float]]:
        """Return each trial's `test/…` metrics."""
        if not self.configs:
            return {}
        self._evaluation = Evaluation(self._workload, len(self.configs))
        for batch in self.evaluation_batches("test"):
            self.evaluate_step(batch)
        return dict(zip(self.configs, self._evaluation.results("test"), strict=True))

    def model_state(self, number: int) -> dict[str, Tensor]:
        """Return a trial's parameters and buffers by name, on the CPU."""
        row = list(self.configs).index(number)
        with torch.no_grad():
            parameters = dict(self._model.named_parameters())
            for name, value in self._layout.views(self._evaluated).items():
                parameters[name].copy_(value[row])
            buffers = dict(self._model.named_buffers())
            for name, value in self._buffers.items():
                buffers[name].copy_(value[row])
        state = self._model.state_dict()
        return {name: value.detach().cpu().clone() for name, value in state.items() if isinstance(value, Tensor)}

    def state_dict(self) -> dict[str, Any]:
        """Return each trial's row and everything else that the trial's next epoch depends on."""
        matrix, optimizers = self._matrix.cpu(), self._optimizer.row_states()
        averages = None if self._averages is None else self._averages.cpu()
        buffers = {name: buffer.cpu() for name, buffer in self._buffers.items()}
        return {
            str(number): {
                "epoch": self._epoch,
                "step": self._step,
                "row": matrix[row].clone(),
                "average": None if averages is None else averages[row].clone(),
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
            if saved["average"] is not None:
                self._averages = torch.empty_like(self._matrix) if self._averages is None else self._averages
                self._averages[row] = saved["average"]
            for name, buffer in self._buffers.items():
                buffer[row] = saved["buffers"][name]
            self._optimizer.load_row_state(number, saved["optimizer"], steps=self._step)

    def _check_layout(self, saved: Mapping[str, Any]) -> None:
        """Raise a ValueError if a row's state has other parameters or buffers than the model, or another order."""
        if self._layout.described() != saved["layout"]:
            raise ValueError("its parameters have other names, shapes or another order")
        check_shapes({name: buffer[0] for name, buffer in self._buffers.items()}, saved["buffers"])

    def _losses(
        self, batch: Batch, parameters: Mapping[str, Tensor], *, evaluating: bool = False
    ) -> tuple[Tensor, Any]:
        """Return each row's loss (row,) on one batch; in an evaluation with metrics also the outputs (row, …)."""
        loss, targets = self._workload.loss, batch.targets
        needs_outputs = evaluating and self._evaluation.needs_outputs
        step = self._step + len(self._record.sizes) // self._config.accumulate

        def outputs_of(model: nn.Module) -> Any:
            if not evaluating:
                return run_model(model, batch.inputs)
            with autocast(self._config, self._device):
                outputs = run_model(model, batch.inputs)
            return without_bf16(outputs)

        if loss is F.cross_entropy and isinstance(targets, Tensor) and targets.ndim == 1:
            outputs = self._each_row(outputs_of, parameters, self._buffers)
            if isinstance(outputs, Tensor) and outputs.ndim == 3:
                return cross_entropy_of_rows(outputs, targets), outputs
            return vmap(loss, in_dims=(0, None))(outputs, targets), outputs

        def loss_and_outputs(model: nn.Module) -> tuple[Tensor, Any]:
            outputs = outputs_of(model)
            return loss_of(loss, outputs, targets, step=step), outputs if needs_outputs else None

        losses, outputs = self._each_row(loss_and_outputs, parameters, self._buffers)
        return losses, outputs

    def _lr_points(self, number: int) -> dict[str, tuple[tuple[int, float], ...]]:
        """Return group name to points (step, rate) of a trial in the epoch; the rate of a frozen group is 0."""
        steps, rates = self._accumulation.steps, self._rates[number]
        all_rates = {name: rates.get(name, [0.0] * steps) for name in self._config.group_names}
        first = self._step - steps + 1
        points = {name: tuple(enumerate(values, start=first)) for name, values in all_rates.items()}
        if self._optimizer.moves_every_step(number):
            return points
        return {name: group_points[-1:] for name, group_points in points.items()}

    def _keep(self, numbers: Sequence[int]) -> None:
        """Keep only the rows of these trials; the order of rows stays."""
        if len(numbers) == len(self.configs):
            return
        staying = [row for row, number in enumerate(self.configs) if number in numbers]
        index = torch.tensor(staying, dtype=torch.long, device=self._device)
        self._matrix = self._matrix[index]
        self._averages = None if self._averages is None else self._averages[index]
        self._buffers = {name: buffer[index] for name, buffer in self._buffers.items()}
        self._optimizer.keep(staying)
        self._training.clear()
        self._evaluating.clear()
        self.configs = {n: c for n, c in self.configs.items() if n in numbers}


def cross_entropy_of_rows(logits: Tensor, targets: Tensor) -> Tensor:
    """Return `F.cross_entropy` of each row (row,), from logits (row, sample, class) and classes (sample,).

    `torch.func.vmap` would compute the loss in many small operations, which take a fifth of a small network's step.
    """
    rows, samples, _ = logits.shape
    losses = F.cross_entropy(logits.flatten(0, 1), targets.repeat(rows), reduction="none", ignore_index=IGNORED)
    return losses.view(rows, samples).sum(dim=1) / (targets != IGNORED).sum()
