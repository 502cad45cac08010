"""Check that a workload's data, model, loss and metrics fit each other, by trying a few samples."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import DataError, Problem, first_line
from pipeline.files.code import own_line
from pipeline.workloads.build import built_model, run_model
from pipeline.workloads.data import (
    augmented,
    epoch_length,
    epoch_order,
    first_batch,
    model_batch,
    on_device,
    samples_of,
)
from pipeline.workloads.random_state import seeded
from pipeline.workloads.streamed import DRAW_FROM, Streamed, numbers_of
from pipeline.workloads.trees import described, map_tensors, tensors
from pipeline.workloads.workload import Batch, Metric, Split, Workload, move

CPU = torch.device("cpu")
SAMPLES_TRIED = 4
"""Samples that are tried, besides one of the smallest label and one of the largest."""
CLASSES_SHOWN = 5
"""Missing classes that a message names."""


def workload_problems(
    workload: Workload,
    *,
    batch_sizes: Sequence[int],
    device: torch.device,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Problem]:
    """Yield the problems of a workload that `pipeline.workloads.data.to_device` returned.

    The samples are tried on the CPU, where an index out of range raises an error and does not stop the device. Without
    a problem there, or if the problem is that a tensor is on the device already, they are tried on the device too.

    Args:
        workload: A custom workload, or a built-in one with data from files.
        device: Where trials train.
        batch_sizes: Samples per batch.
        seed: The search's.
        dtype: Type of floating-point data.
    """
    splits = {name: getattr(workload, name) for name in ("train", "val", "test")}
    in_memory = {name: split for name, split in splits.items() if isinstance(split, Split)}
    not_finite = [problem for name, split in in_memory.items() for problem in _not_finite(name, split)]
    yield from not_finite
    if not_finite:
        return
    problems = list(order_problems(workload, seed))
    for place in () if problems else dict.fromkeys((CPU, device)):
        if all(f"{device.type}:" in str(problem) for problem in problems):  # as in: expected cpu, got cuda:0
            tried = _Tried(_on(workload, place, dtype), seed=seed, device=place, dtype=dtype)
            with seeded(seed, place):
                problems = tried.problems() or list(_last_batch_problems(tried, batch_sizes, seed))
    yield from problems
    if not problems:
        yield from _class_problems(in_memory, tried.outputs)


def order_problems(workload: Workload, seed: int) -> Iterator[Problem]:
    """Yield the problem of a workload's `order`, in its first two epochs."""
    try:
        for epoch in range(2):
            epoch_order(workload, seed=seed, epoch=epoch)
    except DataError as error:
        yield Problem("workload", str(error))


def _on(workload: Workload, device: torch.device, dtype: torch.dtype) -> Workload:
    """Return a workload whose loss and metrics compute on a device."""
    metrics = {
        name: dataclasses.replace(metric, function=on_device(metric.function, device, dtype))
        for name, metric in workload.metrics.items()
    }
    return dataclasses.replace(workload, loss=on_device(workload.loss, device, dtype), metrics=metrics)


def _not_finite(name: str, split: Split) -> Iterator[Problem]:
    for kind, tree in (("input", split.inputs), ("target", split.targets)):
        for values in tensors(tree):
            if values.is_floating_point() and not bool(torch.isfinite(values).all()):
                bad = (~torch.isfinite(values)).reshape(len(values), -1).any(dim=1)
                first, count = int(bad.int().argmax()), int(bad.sum())
                message = f"{kind} {first} holds a NaN or an infinity, as do {count} in all; remove or replace them"
                yield Problem(f"workload.{name}", message)


class _Tried:
    """A model that is trained and evaluated on a few samples, as trials are."""

    def __init__(self, workload: Workload, *, seed: int, device: torch.device, dtype: torch.dtype) -> None:
        self.workload = workload
        self.device, self.dtype = device, dtype
        self.model = built_model(workload, seed=seed, device=device, dtype=dtype)
        self.outputs: Any = None
        """Outputs of the last batch."""

    def problems(self) -> list[Problem]:
        """Train on a batch, and evaluate one; return the problems."""
        if isinstance(self.workload.loss, nn.Module) and any(p.requires_grad for p in self.workload.loss.parameters()):
            return [
                Problem("workload", "the loss has parameters, which no optimizer would train; give them to the model")
            ]
        for name in ("train", "val"):
            try:
                batch = _extremes(self.workload, name, self.device)
                if self.workload.collate is not None:
                    again = _extremes(self.workload, name, self.device)
                    if numbers_of(again.both) != numbers_of(batch.both):
                        raise DataError(f"collate differs when it is called again with the same seed; {DRAW_FROM}")
            except DataError as error:
                return [Problem(f"workload.{name}", str(error))]
            try:
                batch = self._as_the_model_sees(batch, augment=name == "train")
            except DataError as error:
                takes = "it takes (inputs, generator) or (inputs, targets, generator)"
                hint = f"; {takes}" if str(error).startswith("augment raised") else ""
                line = own_line(error.__cause__) if error.__cause__ else []
                told = ", ".join([f"{error}, on inputs {described(batch.inputs)}", *line])
                return [Problem("workload", told + hint)]
            if problem := self._forward(batch, training=name == "train") or self._loss_problem(name, batch):
                return [problem]
        return list(self._metric_problems(batch))

    def _as_the_model_sees(self, batch: Batch, *, augment: bool) -> Batch:
        before = batch
        if augment and self.workload.augment is not None:
            remedy = "draw from the generator that it is given"
            given = copy.deepcopy(batch)  # augment may change a batch in place
            batch = augmented(self.workload, batch, seed=0)
            if numbers_of(augmented(self.workload, given, seed=0).both) != numbers_of(batch.both):
                raise DataError(f"augment differs when it is called again with the same seed; {remedy}")
            if described(batch.inputs) != described(before.inputs):
                got = f"of inputs {described(before.inputs)} it made {described(batch.inputs)}"
                raise DataError(f"augment must keep the shape of a batch: {got}")
        batch = model_batch(self.workload, batch, self.dtype)
        if tensors(before.inputs) and not tensors(batch.inputs):
            raise DataError(f"preprocess must return the model's inputs, got {described(batch.inputs)}")
        return batch

    def _forward(self, batch: Batch, *, training: bool) -> Problem | None:
        """Compute the model; return a problem if the model raises."""
        given = f"an input {described(batch.inputs)}"
        if isinstance(batch.inputs, Mapping):
            try:
                inspect.signature(self.model.forward).bind(**batch.inputs)
            except TypeError as error:
                has = ", ".join(batch.inputs)
                return Problem("workload", f"the model's forward is given the dict's keys {has}, and {error}")
        self.model.train(training)
        with torch.set_grad_enabled(training):
            self.outputs, problem = _attempt("the model", given, run_model, self.model, batch.inputs)
        if problem and not training and _attempt("the model", given, run_model, self.model, batch.inputs)[1] is None:
            remedy = "wrap what needs gradients in `with torch.enable_grad():`"
            return Problem("workload", f"in validation, which computes no gradients, {problem.message}; {remedy}")
        if problem and type(batch.inputs) is tuple:
            hint = "a tuple gives the arguments one by one, a list gives one argument"
            return Problem("workload", f"{problem.message}; {hint}")
        return problem

    def _loss_problem(self, name: str, batch: Batch) -> Problem | None:
        outputs, targets = self.outputs, batch.targets
        if problem := _label_problem(name, outputs, targets) or _broadcast_problem(name, outputs, targets):
            return problem
        told = f"outputs {described(outputs)} and targets {described(targets)}"
        loss, problem = _attempt("the loss", told, self.workload.loss, outputs, targets)
        problem = problem or _scalar_problem("the loss", loss)
        if problem is None and not bool(torch.isfinite(loss)):
            message = f"the loss of the fresh model is {loss.item()} on a few samples of {name}; it must begin finite"
            return Problem("workload", message)
        if problem is None and name == "train" and not loss.requires_grad:
            return Problem("workload", "the loss does not depend on the model's parameters: it has no gradient")
        return problem

    def _metric_problems(self, batch: Batch) -> Iterator[Problem]:
        told = f"outputs {described(self.outputs)} and targets {described(batch.targets)}"
        outputs = map_tensors(Tensor.detach, self.outputs)
        for name, metric in self.workload.metrics.items():
            with torch.no_grad():
                value, problem = _attempt(f"the metric {name}", told, _measured, metric, outputs, batch.targets)
            is_number = isinstance(value, numbers.Real)
            if problem := problem or (None if is_number else _scalar_problem(f"the metric {name}", value)):
                yield problem


def _measured(metric: Metric, outputs: Any, targets: Any) -> Any:
    if not metric.accumulates:
        return metric.function(outputs, targets)
    accumulating = copy.deepcopy(metric.function)
    accumulating.reset()
    accumulating.update(outputs, targets)
    return accumulating.compute()


def _last_batch_problems(tried: _Tried, batch_sizes: Sequence[int], seed: int) -> Iterator[Problem]:
    """Yield a problem if the last batch has one sample and the model, with BatchNorm perhaps, cannot train on it."""
    samples, length = samples_of(tried.workload, "train"), epoch_length(tried.workload, seed)
    for batch_size in (size for size in batch_sizes if length % size == 1 and length > 1):
        try:
            one = first_batch(samples, 1).map(functools.partial(move, device=tried.device, dtype=tried.dtype))
            one = model_batch(tried.workload, one, tried.dtype)
        except DataError as error:
            message = f"{batch_size} leaves one of {length} samples for the last batch, and {error}"
            yield Problem("batch_size", f"{message}; another size leaves none or several")
            return
        tried.model.train()
        _, problem = _attempt("the model", "a batch of one sample", run_model, tried.model, one.inputs)
        if problem:
            yield Problem(
                "batch_size",
                f"{batch_size} leaves one of {length} samples for the last batch, and {problem.message}; another"
                " size leaves none or several",
            )


def _class_problems(splits: dict[str, Split], outputs: Any) -> Iterator[Problem]:
    """Yield problems of class labels: a label out of range, a class that only one split has."""
    labels = {name: split.targets for name, split in splits.items() if _are_labels(outputs, split.targets)}
    for name, values in labels.items():
        if problem := _label_problem(name, outputs, values):
            yield problem
    if {"train", "val"} <= labels.keys():
        seen = {name: {n for n in labels[name].unique().tolist() if n >= 0} for name in ("train", "val")}
        for name, other in (("val", "train"), ("train", "val")):
            if missing := sorted(seen[other] - seen[name]):
                shown = ", ".join(map(str, missing[:CLASSES_SHOWN])) + (", …" if len(missing) > CLASSES_SHOWN else "")
                message = f"has no sample of class {shown}, which {other} has; split the data so that it does"
                yield Problem(f"workload.{name}", message)


def _label_problem(name: str, outputs: Any, targets: Any) -> Problem | None:
    if not _are_labels(outputs, targets) or int(targets.max()) < outputs.shape[1]:
        return None
    classes, largest = outputs.shape[1], int(targets.max())
    message = f"labels must be from 0 to {classes - 1}, as the model has {classes} outputs, got {largest}"
    return Problem(f"workload.{name}", message)


def _broadcast_problem(name: str, outputs: Any, targets: Any, key: str = "") -> Problem | None:
    """Return a problem if shapes differ by an axis of 1: `mse_loss` would compare each output with every target."""
    if isinstance(outputs, Mapping) and isinstance(targets, Mapping) and outputs.keys() == targets.keys():
        found = (_broadcast_problem(name, outputs[part], targets[part], f"{key}[{part!r}]") for part in outputs)
        return next(filter(None, found), None)
    if not (isinstance(outputs, Tensor) and isinstance(targets, Tensor) and targets.is_floating_point()):
        return None
    if (*outputs.shape, 1) != tuple(targets.shape) and tuple(outputs.shape) != (*targets.shape, 1):
        return None
    shapes = f"outputs{key} {described(outputs)} and targets{key} {described(targets)}"
    return Problem(f"workload.{name}", f"{shapes} differ by an axis of 1; give both the same")


def _are_labels(outputs: Any, targets: Any) -> bool:
    if not (isinstance(outputs, Tensor) and isinstance(targets, Tensor)):
        return False
    whole = not (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool)
    return whole and targets.ndim == 1 and outputs.ndim == 2 and outputs.shape[1] > 1


def _extremes(workload: Workload, name: str, device: torch.device) -> Batch:
    """Return a few samples; if targets are whole numbers, with a sample of the smallest and of the largest target."""
    samples = samples_of(workload, name)
    samples = samples.read_here() if isinstance(samples, Streamed) else samples
    indices = list(range(min(SAMPLES_TRIED, len(samples))))
    targets = samples.targets if isinstance(samples, Split) else None
    if isinstance(targets, Tensor) and targets.ndim == 1 and not targets.is_floating_point():
        indices += [int(targets.int().argmin()), int(targets.int().argmax())]
    elif len(indices) < 2:
        indices *= 2
    (batch,) = samples.batches([torch.tensor(indices)], seed=0)
    return batch.map(lambda leaf: leaf.to(device) if callable(getattr(leaf, "to", None)) else leaf)


def _attempt(who: str, given: str, function: Callable[..., Any], *arguments: Any) -> tuple[Any, Problem | None]:
    try:
        return function(*arguments), None
    except (Exception, SystemExit) as error:
        message = f"{who} raised {type(error).__name__} on {given}: {first_line(error)}"
        return None, Problem("workload", ", ".join([message, *own_line(error)]))


def _scalar_problem(who: str, value: Any) -> Problem | None:
    if isinstance(value, Tensor) and value.numel() == 1 and value.ndim == 0:
        return None
    got = f"a tensor {described(value)}; take the mean" if isinstance(value, Tensor) else type(value).__name__
    return Problem("workload", f"{who} must return a scalar tensor, got {got}")
