"""Load custom workloads and training loops: a person's function in a file or a package."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from pipeline.errors import InvalidInput, Problem, did_you_mean
from pipeline.files.code import load_module, where
from pipeline.space.config import Own
from pipeline.workloads.loop import Epochs, Loop
from pipeline.workloads.trees import described, leaves, tensors
from pipeline.workloads.workload import Metric, Split, Workload, why_unusable

PLACE = "workload.function"
_MEMBERS = {"build_model": "a function", "loss": "a function of (outputs, targets)"}


def custom_workload(choice: Own) -> Workload | Loop:
    """Load a function, and return the workload that it returns, or the training loop that it is.

    Raises:
        InvalidInput: The function cannot be loaded, raises, or returns something else.
    """
    module, name = load_module(choice.function, place=PLACE)
    function = getattr(module, name, None)
    if not inspect.isfunction(function):
        known = [key for key, value in vars(module).items() if _returns(value, Workload) or _returns(value, Epochs)]
        hint = did_you_mean(name, known) if known else "none of its functions says `-> Workload` or `-> Epochs`"
        _refuse(f"{choice.function.rpartition(':')[0]} has no function {name}; {hint}")
    if not (_returns(function, Workload) or _returns(function, Epochs)):
        # Otherwise a file from elsewhere could have any function called, such as one of the standard library.
        remedy = "-> Workload; a training loop of one's own says -> Epochs"
        _refuse(f"{name} must say that it returns a workload: def {name}(…) {remedy}")
    return call(function, choice.function, **choice.arguments)


def _returns(value: Any, kind: Any) -> bool:
    """Say whether a value is a function whose annotation says that it returns a `Workload`, or `Epochs`."""
    said = value.__annotations__.get("return", "") if inspect.isfunction(value) else ""
    named = "Epochs" if kind is Epochs else "Workload"
    return said is kind or str(said).strip("'\"").rpartition(".")[2] == named


def call(function: Callable[..., Any], name: str, **arguments: Any) -> Workload | Loop:
    """Call a function that returns a workload, and check the workload's members; a training loop is not called yet.

    Raises:
        InvalidInput: The function raises, or does not return a valid workload, or is no generator function.
    """
    if _returns(function, Epochs):
        if not inspect.isgeneratorfunction(inspect.unwrap(function)):
            _refuse(f"{name} says `-> Epochs`, so it must be a generator function, which yields each epoch's metrics")
        return Loop(name=function.__name__, function=function, arguments=arguments)
    try:
        workload = function(**arguments)
    except InvalidInput:
        raise
    except (Exception, SystemExit) as error:
        _refuse(f"{name} raised {where(error)}")
    return check_form(workload, name)


def check_form(workload: Any, name: str) -> Workload:
    """Return a workload after checking the kinds of all its members.

    Raises:
        InvalidInput: With every member of another kind.
    """
    if not isinstance(workload, Workload):
        _refuse(f"{name} must return a pipeline.workloads.workload.Workload, got {type(workload).__name__}")
    try:
        problems = [Problem(PLACE, f"{name} returns a Workload whose {problem}") for problem in _misfits(workload)]
    except (Exception, SystemExit) as error:
        _refuse(f"{name} returns a Workload whose data raised {where(error)}")
    if problems:
        raise InvalidInput("workload", problems)
    return workload


def _misfits(workload: Workload) -> Iterator[str]:
    if not isinstance(workload.name, str):
        yield f"name must be text, got {workload.name!r}"
    if isinstance(model := workload.build_model, nn.Module):
        got = f"got the model {_kind(model)}"
        yield f"build_model must be a function that makes the model, {got}; give lambda: {_kind(model)}(…)"
    for member, wanted in _MEMBERS.items():
        if not callable(getattr(workload, member)):
            yield f"{member} must be {wanted}, got {_kind(getattr(workload, member))}"
    for member in ("preprocess", "augment", "collate", "order"):
        if not (getattr(workload, member) is None or callable(getattr(workload, member))):
            yield f"{member} must be a function or None, got {_kind(getattr(workload, member))}"
    splits = [split for split in (workload.train, workload.val, workload.test) if split is not None]
    if workload.collate is not None and all(isinstance(split, Split) for split in splits):
        yield "collate makes batches of a data set's samples, and train and val are Splits; give data sets, or None"
    for member in ("train", "val", "test"):
        yield from (f"{member} {problem}" for problem in _split_misfits(getattr(workload, member), member))
    metrics = workload.metrics if isinstance(workload.metrics, Mapping) else {}
    if metrics is not workload.metrics:
        yield f"metrics must be a mapping from names to Metrics, got {_kind(workload.metrics)}"
    for key, metric in metrics.items():
        if isinstance(metric, Metric) and not (callable(metric.function) or metric.accumulates):
            yield f"metrics[{key!r}] must have a function of (outputs, targets), got {_kind(metric.function)}"
        elif not isinstance(metric, Metric) or metric.direction not in ("minimize", "maximize"):
            yield f'metrics[{key!r}] must be a Metric with direction "minimize" or "maximize", got {_direction(metric)}'
        elif not (isinstance(key, str) and key.isidentifier()) or key == "loss":
            yield f"metrics may not be called {key!r}; take a word of letters, digits and '_' other than loss"


def _direction(metric: Any) -> str:
    return f"direction {metric.direction!r}" if isinstance(metric, Metric) else _kind(metric)


def _split_misfits(split: Any, member: str) -> Iterator[str]:
    if split is None and member == "test":
        return
    if isinstance(split, Split):
        yield from _tree_misfits(split)
    elif type(split) is tuple and len(split) == 2 and all(isinstance(part, Tensor) for part in split):
        yield "must be a Split or a data set, got a tuple of two tensors; give Split(inputs, targets)"
    elif isinstance(split, torch.utils.data.DataLoader):
        yield (
            "must be a data set, got a DataLoader; give its `dataset`, its `collate_fn` as `collate`, and in place of "
            "a sampler `order`, a function of (epoch, generator) that returns indices"
        )
    elif isinstance(split, torch.utils.data.IterableDataset):
        yield (
            "must have samples that are read by their number, got an IterableDataset; read it into a list, or write a "
            "training loop of your own, a function that says `-> Epochs`"
        )
    elif not (hasattr(split, "__len__") and hasattr(split, "__getitem__")):
        yield f"must be a Split or a data set with a length, got {_kind(split)}"
    elif not len(split):
        yield "must hold at least one sample, got none"


def _tree_misfits(split: Split) -> Iterator[str]:
    """Yield what is wrong with the tensors of a split in memory."""
    parts = [*leaves(split.inputs), *(() if split.targets is None else leaves(split.targets))]
    if others := [part for part in parts if not isinstance(part, Tensor)]:
        yield f"must hold tensors, or tuples or dicts of them, got {_kind(others[0])}; see torch.as_tensor"
    elif not tensors(split.inputs) or not all(part.ndim for part in parts):
        yield "must hold tensors (sample, …), got one without samples"
    elif why := next(filter(None, map(why_unusable, parts)), None):
        yield f"must hold dense tensors, got {why}"
    elif len({len(part) for part in parts}) > 1:
        lengths = f"{described(split.inputs)} inputs and {described(split.targets)} targets"
        yield f"must have a target for each input, and parts of one length, got {lengths}"
    elif not len(split):
        yield "must hold at least one sample, got none"


def _kind(value: Any) -> str:
    return type(value).__name__


def _refuse(message: str) -> NoReturn:
    raise InvalidInput("workload", [Problem(PLACE, message)])
