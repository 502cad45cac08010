"""Check that a workload's data, model, loss and metrics fit each other, by trying a few samples on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import DataError, Problem, first_line
from pipeline.workloads.data import augmented, first_samples, model_inputs, samples_of
from pipeline.workloads.workload import Split, Workload

SAMPLES_TRIED = 4
"""Samples that are tried, besides one of the smallest label and one of the largest."""
CLASSES_SHOWN = 5
"""Missing classes that a message names."""


def workload_problems(workload: Workload, model: nn.Module, *, batch_size: int) -> Iterator[Problem]:
    """Yield the problems of a workload that `pipeline.workloads.data.to_device` returned.

    Args:
        workload: A custom workload, or a built-in one with data from files.
        model: Built by the workload's `build_model`.
        batch_size: Samples per step.
    """
    splits = {name: getattr(workload, name) for name in ("train", "val", "test")}
    in_memory = {name: split for name, split in splits.items() if isinstance(split, Split)}
    not_finite = [problem for name, split in in_memory.items() for problem in _not_finite(name, split)]
    yield from not_finite
    if not_finite:
        return
    model = copy.deepcopy(model).cpu()
    with torch.random.fork_rng(devices=[]):
        problems, outputs = _try_samples(workload, model)
        problems = problems or list(_last_batch_problems(workload, model, batch_size))
    yield from problems
    if not problems and outputs is not None:
        yield from _class_problems(in_memory, outputs)


def _not_finite(name: str, split: Split) -> Iterator[Problem]:
    for kind, values in (("input", split.inputs), ("target", split.targets)):
        if values.is_floating_point():
            bad = (~torch.isfinite(values)).flatten(1).any(dim=1) if values.ndim > 1 else ~torch.isfinite(values)
            if count := int(bad.sum()):
                first = int(bad.int().argmax())
                message = f"{kind} {first} holds a NaN or an infinity, as do {count} in all; remove or replace them"
                yield Problem(f"workload.{name}", message)


def _try_samples(workload: Workload, model: nn.Module) -> tuple[list[Problem], Tensor | None]:
    """Train and evaluate a few samples; return the problems and the outputs."""
    outputs = None
    for name, mode in (("train", True), ("val", False)):
        batch = _extremes(workload, name)
        try:
            inputs = augmented(workload, batch.inputs, seed=0) if mode and workload.augment else batch.inputs
            if inputs.shape != batch.inputs.shape:
                got = f"of inputs {_shape(batch.inputs)} it made {_shape(inputs)}"
                return [Problem("workload", f"augment must keep the shape of a batch: {got}")], None
            inputs = model_inputs(workload, inputs, torch.float32)
        except DataError as error:
            return [Problem("workload", f"{error}, on inputs {_shape(batch.inputs)}")], None
        model.train(mode)
        outputs, problem = _attempt("the model", f"an input {_shape(inputs)}", model, inputs)
        if problem:
            return [problem], None
        if not isinstance(outputs, Tensor):
            return [Problem("workload", f"the model must return a tensor, got {type(outputs).__name__}")], None
        if problem := _label_problem(name, outputs, batch.targets) or _broadcast_problem(name, outputs, batch.targets):
            return [problem], None
        told = f"outputs {_shape(outputs)} and targets {_shape(batch.targets)}"
        loss, problem = _attempt("the loss", told, workload.loss, outputs, batch.targets)
        problem = problem or _scalar_problem("the loss", loss)
        if problem is None and not bool(torch.isfinite(loss)):
            message = f"the loss of the fresh model is {loss.item()} on a few samples of {name}; it must begin finite"
            problem = Problem("workload", message)
        if problem is None and mode and not loss.requires_grad:
            problem = Problem("workload", "the loss does not depend on the model's parameters: it has no gradient")
        if problem:
            return [problem], None
    return list(_metric_problems(workload, outputs, batch.targets)), outputs


def _metric_problems(workload: Workload, outputs: Any, targets: Tensor) -> Iterator[Problem]:
    for name, metric in workload.metrics.items():
        with torch.no_grad():
            told = f"outputs {_shape(outputs)} and targets {_shape(targets)}"
            value, problem = _attempt(f"the metric {name}", told, metric.function, outputs, targets)
        if problem := problem or _scalar_problem(f"the metric {name}", value):
            yield problem


def _last_batch_problems(workload: Workload, model: nn.Module, batch_size: int) -> Iterator[Problem]:
    """Yield a problem if the last batch has one sample and the model, with BatchNorm perhaps, cannot train on it."""
    samples = samples_of(workload, "train")
    if len(samples) % batch_size == 1 and len(samples) > 1:
        one = model_inputs(workload, first_samples(samples, 1).inputs.cpu(), torch.float32)
        model.train()
        _, problem = _attempt("the model", "a batch of one sample", model, one)
        if problem:
            yield Problem(
                "batch_size",
                f"{batch_size} leaves one of {len(samples)} samples for the last batch, and {problem.message}; another"
                " size leaves none or several",
            )


def _class_problems(splits: dict[str, Split], outputs: Tensor) -> Iterator[Problem]:
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


def _label_problem(name: str, outputs: Tensor, targets: Tensor) -> Problem | None:
    if not _are_labels(outputs, targets) or int(targets.max()) < outputs.shape[1]:
        return None
    classes, largest = outputs.shape[1], int(targets.max())
    message = f"labels must be from 0 to {classes - 1}, as the model has {classes} outputs, got {largest}"
    return Problem(f"workload.{name}", message)


def _broadcast_problem(name: str, outputs: Tensor, targets: Tensor) -> Problem | None:
    """Return a problem if shapes differ by an axis of 1: `mse_loss` would compare each output with every target."""
    if not (targets.is_floating_point() and outputs.ndim == targets.ndim + 1 and outputs.shape[-1] == 1):
        return None
    shapes = f"outputs {_shape(outputs)} and targets {_shape(targets)}"
    return Problem(f"workload.{name}", f"{shapes} differ by an axis of 1; give both the same")


def _are_labels(outputs: Tensor, targets: Tensor) -> bool:
    whole = not (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool)
    return whole and targets.ndim == 1 and outputs.ndim == 2 and outputs.shape[1] > 1


def _extremes(workload: Workload, name: str) -> Split:
    """Return a few samples; if targets are whole numbers, with a sample of the smallest and of the largest target."""
    samples = samples_of(workload, name)
    indices = list(range(min(SAMPLES_TRIED, len(samples))))
    if isinstance(samples, Split) and samples.targets.ndim == 1 and not samples.targets.is_floating_point():
        indices += [int(samples.targets.int().argmin()), int(samples.targets.int().argmax())]
    elif len(indices) < 2:
        indices *= 2
    ((inputs, targets),) = samples.batches([torch.tensor(indices)], seed=0)
    return Split(inputs.cpu(), targets.cpu())


def _attempt(who: str, given: str, function: Callable[..., Any], *arguments: Any) -> tuple[Any, Problem | None]:
    try:
        return function(*arguments), None
    except (Exception, SystemExit) as error:
        return None, Problem("workload", f"{who} raised {type(error).__name__} on {given}: {first_line(error)}")


def _scalar_problem(who: str, value: Any) -> Problem | None:
    if isinstance(value, Tensor) and value.numel() == 1 and value.ndim == 0:
        return None
    got = f"a tensor {_shape(value)}" if isinstance(value, Tensor) else type(value).__name__
    return Problem("workload", f"{who} must return a scalar tensor, got {got}; take the mean")


def _shape(value: Tensor) -> str:
    return f"({', '.join(map(str, value.shape))})"
