"""Workloads of a person's own: loaded, checked, searched, from the command line and from Python."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import ONE_GROUP, TinyModel, tiny_config, tiny_workload
from torch import Tensor, nn
from torch.nn import functional as F

import pipeline.search
import pipeline.train
from pipeline.app.prepare import prepare
from pipeline.errors import InvalidInput
from pipeline.search import search
from pipeline.space.config import Own, TrialConfig
from pipeline.space.load import build_space
from pipeline.space.optimizers import AdamW
from pipeline.space.schedules import Constant
from pipeline.space.trial import TrialState
from pipeline.study.store import Store
from pipeline.training.executor import LocalExecutor
from pipeline.training.plain import PlainTrials
from pipeline.workloads.check import workload_problems
from pipeline.workloads.data import to_device
from pipeline.workloads.load import load_workload
from pipeline.workloads.workload import Metric, Split, Workload

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning")

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
SPACE: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 8,
    "objective": {"metric": "val/loss", "direction": "minimize"},
    "optimizer": {"sgd": {"base_lr": {"low": 1e-3, "high": 1.0, "log": True}}},
    "scheduler": {"constant": {}},
    "param_groups": {"all": {"pattern": "*"}},
}
TASK = """
from neighbour import SAMPLES

import torch
from torch import nn
from pipeline.workloads.workload import Split, Workload

number = 5


def line(slope=2.0) -> Workload:
    x = torch.linspace(-1, 1, SAMPLES).unsqueeze(1)
    split = Split(x, slope * x)
    return Workload(name=f"line {slope}", build_model=lambda: nn.Linear(1, 1), train=split, val=split,
                    loss=nn.functional.mse_loss)


def raises() -> Workload:
    raise OSError("no such data")


def other() -> "Workload":
    return {"train": 1}


def malformed() -> Workload:

    x = torch.ones(4, 1)
    return Workload(name="bad", build_model="resnet", train=Split(x, x[:3]), val=[], loss=None, preprocess=3)
"""


@pytest.fixture(autouse=True)
def _own_imports(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a person's file adds to Python's modules and path leaves with the test."""
    modules = set(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    yield
    for name in set(sys.modules) - modules:
        if name.startswith("custom_") or name in ("neighbour", "broken"):
            del sys.modules[name]


@pytest.fixture
def task(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text("SAMPLES = 40\n")
    (tmp_path / "task.py").write_text(TASK)
    return tmp_path / "task.py"


def problems_of(function: str, **arguments: Any) -> list[str]:
    with pytest.raises(InvalidInput) as caught:
        load_workload(Own(function=function, arguments=arguments))
    return [str(problem) for problem in caught.value.problems]


def test_a_function_in_a_file_makes_a_workload_with_its_arguments_and_neighbours(task: Path) -> None:
    workload = load_workload(Own(function=f"{task}:line", arguments={"slope": 3.0}))
    assert isinstance(workload, Workload)
    assert workload.name == "line 3.0"
    assert len(workload.train) == 40


def test_a_function_in_a_package_makes_a_workload() -> None:
    assert load_workload(Own(function="tiny:tiny_workload")).name == "tiny"


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("line", "must be path/to/file.py:function or package.module:function, got 'line'"),
        ("{folder}/absent.py:line", "there is no file {folder}/absent.py; a path is relative to the working folder"),
        ("absent_package.task:line", "there is no module absent_package.task; install it, or name a file"),
        ("{task}:lien", "{task} has no function lien; did you mean line?"),
        ("{task}:number", "{task} has no function number"),
        ("subprocess:getoutput", "getoutput must say that it returns a workload: def getoutput(…) -> Workload"),
        ("{folder}/leaves.py:leaves", "{folder}/leaves.py:leaves raised SystemExit: 0, in {folder}/leaves.py, line 4"),
        ("{task}:raises", "{task}:raises raised OSError: no such data, in {task}, line 19"),
        ("{task}:other", "{task}:other must return a pipeline.workloads.workload.Workload, got dict"),
        ("{folder}/broken.py:line", "{folder}/broken.py raised ZeroDivisionError: division by zero, in "),
        ("{folder}/syntax.py:line", "{folder}/syntax.py raised SyntaxError: "),
        ("{folder}/exits.py:line", "{folder}/exits.py raised SystemExit: 3, in {folder}/exits.py, line 1"),
    ],
)
def test_a_function_that_cannot_be_had_is_refused_with_the_cause(task: Path, function: str, message: str) -> None:
    folder = task.parent
    (folder / "broken.py").write_text("x = 1\ny = x / 0\n")
    (folder / "syntax.py").write_text("def line(:\n")
    (folder / "exits.py").write_text("raise SystemExit(3)\n")
    (folder / "leaves.py").write_text(
        "import sys\nfrom pipeline.workloads.workload import Workload\ndef leaves() -> Workload:\n    sys.exit(0)\n"
    )
    (problem,) = problems_of(function.format(task=task, folder=folder))
    assert problem.startswith("workload.function: " + message.format(task=task, folder=folder))


def test_wrong_arguments_are_refused(task: Path) -> None:
    (problem,) = problems_of(f"{task}:line", width=3)
    assert "line() got an unexpected keyword argument 'width'" in problem


def test_every_member_of_the_wrong_kind_is_named(task: Path) -> None:
    begin = f"workload.function: {task}:malformed returns a Workload whose "
    assert problems_of(f"{task}:malformed") == [
        f"{begin}build_model must be a function, got str",
        f"{begin}loss must be a function of (outputs, targets), got NoneType",
        f"{begin}preprocess must be a function or None, got int",
        f"{begin}train must have a target for each input, and parts of one length, "
        "got (4, 1) inputs and (3, 1) targets",
        f"{begin}val must hold at least one sample, got none",
    ]


def changed(split: Split, **tensors: Tensor) -> Split:
    return dataclasses.replace(split, **tensors)


def with_labels(labels: list[int]) -> Split:
    return Split(torch.ones(len(labels), 6), torch.tensor(labels))


class OneOutput(TinyModel):
    """Returns a tuple."""

    def forward(self, inputs: Tensor) -> Any:
        """Map inputs (batch, 6) to logits and features."""
        return super().forward(inputs), inputs


class NamedOutput(TinyModel):
    """Returns a dict."""

    def forward(self, inputs: Tensor) -> Any:
        """Map inputs (batch, 6) to a dict of values (batch, 3, 1)."""
        return {"depth": super().forward(inputs).unsqueeze(-1)}


NAN_INPUTS = torch.ones(9, 6)
NAN_INPUTS[4, 2] = torch.nan


GENERATOR = np.random.default_rng(0)
"""Draws that no seed repeats."""
EQUAL_SAMPLES = [(torch.ones(6), 0)] * 9


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        (
            {"train": Split(NAN_INPUTS, torch.arange(9) % 3)},
            ["workload.train: input 4 holds a NaN or an infinity, as do 1 in all; remove or replace them"],
        ),
        (
            {"train": with_labels([0, 1, 2, 3] * 3)},
            ["workload.train: labels must be from 0 to 2, as the model has 3 outputs, got 3"],
        ),
        (
            {"val": with_labels([0, 1, 5, 2])},
            ["workload.val: labels must be from 0 to 2, as the model has 3 outputs, got 5"],
        ),
        (
            {"val": with_labels([0, 1, 0, 1])},
            ["workload.val: has no sample of class 2, which train has; split the data so that it does"],
        ),
        (
            {"train": with_labels([0, 1] * 5)},
            ["workload.train: has no sample of class 2, which val has; split the data so that it does"],
        ),
        (
            {"build_model": lambda: nn.Linear(5, 3)},
            ["workload: the model raised RuntimeError on an input (6, 6): mat1 and mat2 shapes cannot be multiplied"],
        ),
        (
            {"build_model": OneOutput},
            ["workload: the loss raised TypeError on outputs ((6, 3), (6, 6)) and targets (6): cross_entropy_loss(): "],
        ),
        (
            {"loss": lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="none")},
            ["workload: the loss must return a scalar tensor, got a tensor (6); take the mean"],
        ),
        (
            {"loss": lambda outputs, targets: targets.float().mean()},
            ["workload: the loss does not depend on the model's parameters: it has no gradient"],
        ),
        (
            {"metrics": {"hits": Metric(lambda outputs, targets: outputs[100], "maximize")}},
            ["workload: the metric hits raised IndexError on outputs (6, 3) and targets (6)"],
        ),
        (
            {"metrics": {"hits": Metric(lambda outputs, targets: "half", "maximize")}},
            ["workload: the metric hits must return a scalar tensor, got str"],
        ),
        (
            {"augment": lambda inputs: inputs},
            ["workload: augment raised TypeError: "],
        ),
        (
            {"augment": lambda inputs, generator: inputs[:2]},
            ["workload: augment must return as many samples as it is given, 6, got (2, 6); change samples in place of"],
        ),
        (
            {"augment": lambda inputs, generator: inputs[:, :2]},
            ["workload: augment must keep the shape of a batch: of inputs (6, 6) it made (6, 2)"],
        ),
        (
            {"augment": lambda inputs, generator: inputs + GENERATOR.random()},
            ["workload: augment differs when it is called again with the same seed; draw from the generator that"],
        ),
        ({"augment": lambda inputs, generator: inputs.add_(torch.rand((), generator=generator))}, []),
        (
            {"train": EQUAL_SAMPLES, "val": EQUAL_SAMPLES, "collate": lambda samples: (GENERATOR.random(), samples)},
            ["workload.train: collate differs when it is called again with the same seed; draw from the global random"],
        ),
        (
            {"preprocess": lambda inputs: inputs.nothing},
            ["workload: preprocess raised AttributeError: 'Tensor' object has no attribute 'nothing'"],
        ),
        (
            {
                "loss": F.mse_loss,
                "build_model": lambda: nn.Linear(6, 1),
                "metrics": {},
                **dict.fromkeys(("train", "val"), Split(torch.ones(9, 6), torch.ones(9))),
            },
            ["workload.train: outputs (4, 1) and targets (4) differ by an axis of 1; give both the same"],
        ),
        (
            {
                "loss": F.mse_loss,
                "build_model": lambda: nn.Sequential(nn.Linear(6, 1), nn.Flatten(0)),
                "metrics": {},
                **dict.fromkeys(("train", "val"), Split(torch.ones(9, 6), torch.ones(9, 1))),
            },
            ["workload.train: outputs (4) and targets (4, 1) differ by an axis of 1; give both the same"],
        ),
        (
            {
                "loss": lambda outputs, targets: F.mse_loss(outputs["depth"], targets["depth"]),
                "build_model": NamedOutput,
                "metrics": {},
                **dict.fromkeys(("train", "val"), Split(torch.ones(9, 6), {"depth": torch.ones(9, 3)})),
            },
            ["workload.train: outputs['depth'] (4, 3, 1) and targets['depth'] (4, 3) differ by an axis of 1; give"],
        ),
        ({"val": Split(torch.ones(4, 6), torch.tensor([0, 1, 2, -100]))}, []),
        (
            {"loss": lambda outputs, targets: F.cross_entropy(outputs, targets) / 0},
            ["workload: the loss of the fresh model is inf on a few samples of train; it must begin finite"],
        ),
        (
            {"build_model": lambda: TinyModel(batch_norm=True), "train": with_labels([0, 1, 2] * 11)},
            ["batch_size: 8 leaves one of 33 samples for the last batch, and the model raised ValueError on a batch"],
        ),
    ],
)
def test_data_model_loss_and_metrics_are_tried_before_the_search(changes: dict[str, Any], expected: list[str]) -> None:
    workload = to_device(dataclasses.replace(tiny_workload(), **changes), device=CPU, dtype=torch.float32)
    found = [str(problem) for problem in workload_problems(workload, batch_sizes=[8], device=CPU)]
    assert len(found) == len(expected)
    for problem, beginning in zip(found, expected, strict=True):
        assert problem.startswith(beginning)


ONE_MODEL = nn.Linear(6, 3)


def numeral(*_: Any) -> Any:
    return json.loads("list")


def broken_weights() -> nn.Module:
    model = nn.Linear(6, 3)
    nn.init.constant_(model.weight, torch.nan)
    return model


class BadData:
    """A data set that cannot be read."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        raise ValueError(f"cat/{index}.jpg is truncated")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": BadData()}, "workload.train: sample 0 raised ValueError: cat/0.jpg is truncated"),
        ({"val": [(torch.ones(6), "cat")] * 5}, "workload.val: sample 0 must hold tensors, arrays or numbers, got str"),
        (
            {"val": [{"x": torch.ones(6)}] * 5},
            "workload: the model's forward is given the dict's keys x, and missing a required argument: 'inputs'",
        ),
        ({"build_model": lambda: [][0]}, "workload: build_model raised IndexError: list index out of range"),
        ({"build_model": numeral}, f"(char 0), in {__file__}, line {numeral.__code__.co_firstlineno + 1}"),
        (
            {"augment": numeral},
            f", on inputs (6, 6), in {__file__}, line {numeral.__code__.co_firstlineno + 1}; it takes",
        ),
        ({"loss": numeral}, f"(char 0), in {__file__}, line {numeral.__code__.co_firstlineno + 1}"),
        ({"build_model": lambda: ONE_MODEL}, "workload: build_model must make a new model each time"),
        ({"build_model": lambda: nn.LazyLinear(3)}, "workload: build_model must return a model whose parameters exist"),
        ({"build_model": lambda: broken_weights()}, "workload: the model begins with a NaN or an infinity in weight"),
        ({"build_model": lambda: "model"}, "workload: build_model must return a torch.nn.Module, got str"),
        ({"build_model": nn.Identity}, "workload.model: has no parameter to train"),
    ],
)
def test_what_cannot_be_read_or_built_is_refused(changes: dict[str, Any], message: str) -> None:
    space = build_space({"workload": {"name": "own", "function": "a:b"}, **SPACE}, source="space", name="space")
    workload = dataclasses.replace(tiny_workload(), **changes)
    with pytest.raises(InvalidInput, match=re.escape(message)):
        prepare(space, source="mine.yaml", device="cpu", searching=True, workload=workload)


def exits(*arguments: Any) -> Any:
    sys.exit(3)


class Exits(TinyModel):
    """Exits in validation, or in training."""

    def __init__(self, *, training: bool) -> None:
        super().__init__()
        self.exits_in_training = training

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training == self.exits_in_training:
            sys.exit(3)
        return super().forward(inputs)


class Slope(TinyModel):
    """Takes derivatives by its input, in validation too."""

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = inputs.detach().requires_grad_()
        logits = super().forward(inputs)
        (slope,) = torch.autograd.grad(logits.sum(), inputs, create_graph=True)
        return logits + slope[:, :3]


class ExitingData:
    """A data set that exits at one sample, or as it is asked for its length."""

    def __init__(self, at: int | None) -> None:
        self.at = at

    def __len__(self) -> int:
        return SAMPLES if self.at is not None else exits()

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        torch.rand(1)  # a data set that draws is read during training
        return exits() if index == self.at else (torch.ones(6), index % 3)


class ExitingMetric:
    """Exits as it is asked for its value."""

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Take a batch."""

    def compute(self) -> Any:
        return exits()

    def reset(self) -> None:
        """Forget all batches."""


class Endless(torch.utils.data.IterableDataset[Any]):
    """Samples without numbers."""

    def __iter__(self) -> Iterator[Any]:
        yield torch.ones(6), 0


class Centers(nn.Module):
    """A loss that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.centers = nn.Parameter(torch.ones(3))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs - self.centers, targets)


def numbered(build_model: Callable[[int], nn.Module]) -> Callable[[], nn.Module]:
    """Return a function that builds another model each time."""
    numbers = itertools.count()
    return lambda: build_model(next(numbers))


def filled(number: int) -> nn.Module:
    model = nn.Linear(6, 3)
    nn.init.constant_(model.weight, number)
    return model


def quantized(values: Tensor) -> Tensor:
    with warnings.catch_warnings(action="ignore"):  # PyTorch will remove quantized tensors
        made: Tensor = torch.quantize_per_tensor(values, 0.1, 0, torch.qint8)
        return made


SAMPLES = 37
X = torch.ones(6)
GOOD = [(torch.ones(6), index % 3) for index in range(SAMPLES)]
LABELS = torch.arange(SAMPLES) % 3
INPUTS = torch.ones(SAMPLES, 6)
DIFFER = "differ in form; a `collate` may pad or list them"
PARTS = "workload.function: workload returns a Workload whose train must"

BATCHES: dict[str, tuple[dict[str, Any], str]] = {
    "no parts": ({"train": [()] * 10}, "workload.train: sample 0 must give (inputs…, target), got nothing"),
    "None for a sample": (
        {"val": [None] * 10},
        "workload.val: sample 0 must hold tensors, arrays or numbers, got NoneType; a `collate` takes anything",
    ),
    "another number of parts": (
        {"train": [(X, 0)] * 5 + [(X, X, 0)] + [(X, 0)] * 5},
        f"workload.train: samples 0, 1, 2, … differ, ((6), int) and ((6), (6), int) {DIFFER}",
    ),
    "a tensor among dicts": (
        {"train": [({"x": X}, 0)] * 5 + [(X, 0)]},
        f"workload.train: samples 0, 1, 2, … differ, {{x: (6)}} and (6) {DIFFER}",
    ),
    "another shape": (
        {"train": [(X, 0)] * 5 + [(X[1:], 0)]},
        "workload.train: samples 0, 1, 2, … differ, with shapes (6,) and (5,); a `collate` may pad or list them",
    ),
    "a key too many": (
        {"train": [({"inputs": X, "mask": X}, 0)] * 10},
        "the model's forward is given the dict's keys inputs, mask, and got an unexpected keyword argument 'mask'",
    ),
    "a key that lacks": (
        {"train": Split({"x": INPUTS}, LABELS)},
        "the model's forward is given the dict's keys x, and missing a required argument: 'inputs'",
    ),
    "an argument too many": (
        {"train": [(X, X, 0)] * 10},
        "takes 2 positional arguments but 3 were given; a tuple gives the arguments one by one, a list gives one",
    ),
    "inputs of unlike length": (
        {"train": Split({"a": INPUTS, "b": INPUTS[1:]}, LABELS)},
        f"{PARTS} have a target for each input, and parts of one length, got {{a: (37, 6), b: (36, 6)}} inputs",
    ),
    "targets of unlike length": (
        {"train": Split(INPUTS, {"y": LABELS, "z": LABELS[1:]})},
        f"{PARTS} have a target for each input, and parts of one length, got (37, 6) inputs and {{y: (37), z: (36)}}",
    ),
    "collate raises": (
        {"train": GOOD, "collate": lambda samples: samples.nothing},
        "workload.train: collate raised AttributeError: 'list' object has no attribute 'nothing'",
    ),
    "collate takes nothing": (
        {"train": GOOD, "collate": lambda: None},
        "workload.train: collate raised TypeError: ",
    ),
    "collate returns None": (
        {"train": GOOD, "collate": lambda samples: None},
        "workload.train: collate must give (inputs…, target), got None",
    ),
    "collate returns nothing": (
        {"train": GOOD, "collate": lambda samples: ()},
        "workload.train: collate must give (inputs…, target), got nothing",
    ),
    "collate returns text": (
        {"train": GOOD, "collate": lambda samples: ("a batch", LABELS[: len(samples)])},
        "workload: the model raised TypeError on an input str: ",
    ),
    "collate loses a sample": (
        {"train": GOOD, "collate": lambda samples: (INPUTS[1 : len(samples)], LABELS[: len(samples)])},
        "workload: the loss raised ValueError on outputs (3, 3) and targets (4): ",
    ),
    "collate without a data set": (
        {"collate": lambda samples: samples},
        "whose collate makes batches of a data set's samples, and train and val are Splits; give data sets, or None",
    ),
    "order beyond the data": (
        {"order": lambda epoch, generator: [0, 37]},
        "workload: order must return indices from 0 to 36, got 0 to 37",
    ),
    "order from the end": (
        {"order": lambda epoch, generator: [-1, 0]},
        "workload: order must return indices from 0 to 36, got -1 to 0",
    ),
    "order of nothing": (
        {"order": lambda epoch, generator: []},
        "workload: order must return the indices of at least one sample, got none",
    ),
    "order of fractions": (
        {"order": lambda epoch, generator: [0.5]},
        "workload: order must return the indices of at least one sample, got (1) torch.float32",
    ),
    "order returns None": (
        {"order": lambda epoch, generator: None},
        "workload: order raised TypeError: 'NoneType' object is not iterable",
    ),
    "order without the generator": ({"order": lambda epoch: [0]}, "workload: order raised TypeError: "),
    "order is a list": ({"order": [0, 1]}, "whose order must be a function or None, got list"),
    "order of another length": (
        {"order": lambda epoch, generator: range(10 + epoch)},
        "workload: order must give as many indices in each epoch, got 10 and, in epoch 1, 11",
    ),
    "outputs that the loss cannot take": (
        {"loss": lambda outputs, targets: F.nll_loss(outputs.T, targets)},
        "workload: the loss raised ValueError on outputs (6, 3) and targets (6): ",
    ),
    "targets of NumPy without an axis": (
        {"loss": F.mse_loss, "build_model": lambda: nn.Linear(6, 1), "train": [(X.double().numpy(), 1.0)] * 9},
        "workload.train: outputs (4, 1) and targets (4) differ by an axis of 1; give both the same",
    ),
    "data on meta": (
        {"train": Split(INPUTS.to("meta"), LABELS)},
        f"{PARTS} hold dense tensors, got a tensor on meta, which has no values; load them",
    ),
    "sparse data": (
        {"train": Split(INPUTS.to_sparse(), LABELS)},
        f"{PARTS} hold dense tensors, got sparse_coo; call to_dense()",
    ),
    "quantized data": (
        {"train": Split(quantized(INPUTS), LABELS)},
        f"{PARTS} hold dense tensors, got a quantized tensor; call dequantize()",
    ),
    "a sample on meta": (
        {"train": [(X.to("meta"), 0)] * 9},
        "workload.train: sample 0 must hold dense tensors, got a tensor on meta, which has no values; load them",
    ),
    "a sparse sample": (
        {"train": [(X.to_sparse(), 0)] * 9},
        "workload.train: sample 0 must hold dense tensors, got sparse_coo; call to_dense()",
    ),
    "preprocess returns None": (
        {"preprocess": lambda inputs: None},
        "workload: preprocess must return the model's inputs, got NoneType, on inputs (6, 6)",
    ),
    "augment returns None": (
        {"augment": lambda inputs, generator: None},
        "workload: augment must keep the shape of a batch: of inputs (6, 6) it made NoneType",
    ),
    "augment loses the targets": (
        {"augment": lambda inputs, targets, generator: inputs},
        "workload: augment takes targets too, so it must return (inputs, targets), got (6, 6)",
    ),
    "augment returns three": (
        {"augment": lambda inputs, targets, generator: (inputs, targets, 1)},
        "workload: augment takes targets too, so it must return (inputs, targets), got ((6, 6), (6), int)",
    ),
    "augment shortens the targets": (
        {"augment": lambda inputs, targets, generator: (inputs, targets[:2])},
        "workload: the loss raised ValueError on outputs (6, 3) and targets (2): ",
    ),
    "data of NumPy": (
        {"train": Split(INPUTS.numpy(), LABELS.numpy())},
        f"{PARTS} hold tensors, or tuples or dicts of them, got ndarray; see torch.as_tensor",
    ),
    "a tuple of tensors": (
        {"train": (INPUTS, LABELS)},
        f"{PARTS} be a Split or a data set, got a tuple of two tensors; give Split(inputs, targets)",
    ),
    "a number for a name": ({"name": 3}, "returns a Workload whose name must be text, got 3"),
    "a model in place of a function": (
        {"build_model": nn.Linear(6, 3)},
        "build_model must be a function that makes the model, got the model Linear; give lambda: Linear(…)",
    ),
    "a DataLoader": (
        {"train": torch.utils.data.DataLoader(GOOD)},  # type: ignore[arg-type]
        f"{PARTS} be a data set, got a DataLoader; give its `dataset`, its `collate_fn` as `collate`, and in place",
    ),
    "an iterable data set": (
        {"train": Endless()},
        f"{PARTS} have samples that are read by their number, got an IterableDataset; read it into a list, or write",
    ),
    "other weights from one seed": (
        {"build_model": numbered(filled)},
        "workload: build_model must give the same model from the same seed, got weight twice otherwise; draw weights",
    ),
    "other layers from one seed": (
        {"build_model": numbered(lambda number: nn.Sequential(*[nn.Linear(6, 6)] * (number % 2), nn.Linear(6, 3)))},
        "workload: build_model must give the same model from the same seed, got 0.weight twice otherwise; draw",
    ),
    "a loss with parameters": (
        {"loss": Centers()},
        "workload: the loss has parameters, which no optimizer would train; give them to the model",
    ),
    "derivatives in validation": (
        {"build_model": Slope},
        "workload: in validation, which computes no gradients, the model raised RuntimeError on an input (6, 6): ",
    ),
    "augment of inputs and targets alone": (
        {"augment": lambda inputs, targets: inputs * targets.float()},
        "; it takes (inputs, generator) or (inputs, targets, generator)",
    ),
    "exit in build_model": ({"build_model": exits}, "workload: build_model raised SystemExit: 3, in "),
    "exit in training": ({"build_model": lambda: Exits(training=True)}, "workload: the model raised SystemExit on an "),
    "exit in validation": ({"build_model": lambda: Exits(training=False)}, "workload: the model raised SystemExit on "),
    "exit in the loss": ({"loss": exits}, "workload: the loss raised SystemExit on outputs (6, 3) and targets (6): 3"),
    "exit in a metric": ({"metrics": {"a": Metric(exits, "minimize")}}, "workload: the metric a raised SystemExit on "),
    "exit in a metric's value": (
        {"metrics": {"a": Metric(ExitingMetric(), "minimize")}},
        "workload: the metric a raised SystemExit on outputs (6, 3) and targets (6): 3",
    ),
    "exit in augment": ({"augment": lambda inputs, generator: exits()}, "workload: augment raised SystemExit: 3"),
    "exit in preprocess": ({"preprocess": exits}, "workload: preprocess raised SystemExit: 3"),
    "exit in collate": ({"train": GOOD, "collate": exits}, "workload.train: collate raised SystemExit: 3"),
    "exit in order": ({"order": lambda epoch, generator: exits()}, "workload: order raised SystemExit: 3"),
    "exit in the first sample": ({"train": ExitingData(0)}, "workload.train: sample 0 raised SystemExit: 3"),
    "exit in a later sample": ({"train": ExitingData(20)}, "workload: sample 20 raised SystemExit: 3"),
    "exit in the length": ({"train": ExitingData(None)}, "returns a Workload whose data raised SystemExit: 3, in "),
}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", BATCHES)
def test_batches_that_cannot_be_trained_on_are_refused_before_anything_is_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.workloads.streamed._reader_count", lambda: 0)
    changes, message = BATCHES[name]

    def job() -> Workload:
        return dataclasses.replace(tiny_workload(), **{"metrics": {}, **changes})

    with pytest.raises(InvalidInput) as refused:
        search(SPACE | {"workload": {"name": "digits"}}, workload=job, trials=1, root=tmp_path / "new", device="cpu")
    (problem,) = refused.value.problems
    assert message in str(problem)
    assert "\n" not in str(problem)
    assert list(tmp_path.iterdir()) == []


def test_bad_input_ends_with_a_message_and_leaves_nothing(task: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for function in (f"{task}:raises", f"{task}:line"):
        with pytest.raises(InvalidInput) as caught:
            pipeline.search.main(
                ["--workload", function, "--set", "batch_size=41", "--root", str(task.parent), "--trials", "2"]
            )
        assert caught.value.exit_status == 2
    assert "batch_size: must be at most the 40 training samples, got 41" in str(caught.value)
    assert sorted(path.name for path in task.parent.iterdir() if path.name != "__pycache__") == [
        "neighbour.py",
        "task.py",
    ]


def run(*arguments: str) -> tuple[int, str]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = pipeline.search.main([*arguments, "--device", "cpu"])
    return status, printed.getvalue()


@pytest.mark.usefixtures("root_with_tables")
def test_a_search_over_a_file_of_ones_own_and_its_way_on(task: Path) -> None:
    command = ["--root", str(task.parent), "--set", "batch_size=8", "--set", "scheduler={constant: {}}"]
    status, printed = run("--workload", f"{task}:line", "--trials", "3", *command)
    assert status == 0
    assert printed.startswith(f"workload from {task}:line\nline 2.0 · 20 epochs · cpu")
    best = task.parent / "mlruns" / "studies" / "task-line-1" / "best.yaml"
    with pytest.raises(InvalidInput, match=re.escape(f"code that is run only when you name it: add --workload {task}")):
        run("--study", "task-line-1", "--trials", "4", "--root", str(task.parent))
    status, printed = run(
        "--study", "task-line-1", "--trials", "4", "--root", str(task.parent), "--workload", f"{task}:line"
    )
    assert (status, "4/4" in printed) == (0, True)
    printed_again = io.StringIO()
    with contextlib.redirect_stdout(printed_again):
        assert pipeline.train.main([str(best), "--device", "cpu", "--out", str(task.parent / "model.pt")]) == 0
    assert "repeated      every metric of the search, to the last bit" in printed_again.getvalue()


def templates(page: str) -> list[str]:
    """Return the Python blocks of a page that hold a workload."""
    text = (ROOT / page).read_text()
    return [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "-> Workload" in block]


@pytest.mark.usefixtures("root_with_tables")
def test_the_template_of_a_workload_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = templates("docs/own-workloads.md")
    name = code.splitlines()[0].removeprefix("# ")
    page = (ROOT / "docs" / "own-workloads.md").read_text()
    commands = re.findall(rf"^python -m pipeline\.search (--workload {name}:.*)$", page, re.MULTILINE)
    assert [shlex.split(command)[1:4] for command in commands] == [[f"{name}:sine", "--trials", "20"]] * 2
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text(code)
    for number, command in enumerate(commands, 1):
        status, printed = run(*shlex.split(command), "--trials", "4", "--set", "epochs=4")
        assert status == 0
        assert "each alone" not in printed  # its trials are rows
        study = Store(tmp_path).open(f"my_task-sine-{number}")
        values = [trial.metrics[study.space.objective.metric] for trial in study.ended if trial.value is not None]
        assert study.best()[0].value == min(values)
    assert study.space.objective.metric == "val/mae"


def test_a_search_from_python_makes_its_root_and_returns_its_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = {"error": Metric(lambda outputs, targets: (outputs.argmax(dim=1) != targets).double().mean(), "minimize")}
    workload = dataclasses.replace(tiny_workload(), metrics=metrics)
    objective = {"metric": "val/error", "direction": "minimize"}
    result = search(
        {"workload": {"name": "digits"}, **SPACE},
        workload=workload,
        overrides={"objective": objective},
        trials=6,
        root=tmp_path / "new" / "root",
        device="cpu",
        quiet=True,
    )
    assert (tmp_path / "new" / "root" / "mlflow.db").is_file()
    assert capsys.readouterr().out == ""
    assert result.exit_status == 0
    assert [trial.number for trial in result.trials] == list(range(6))
    complete = [trial for trial in result.trials if trial.state is TrialState.COMPLETE]
    assert result.best is not None
    assert result.best.value == min(trial.metrics["val/error"] for trial in complete)
    assert result.config_file is not None
    assert result.config_file.is_file()
    assert result.trials[0].config.workload == Own(function="python:tiny")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"trials": 0}, "trials: must be a whole number from 1 to 1000000000, got '0'"),
        ({"trials": 2.5}, "trials: must be a whole number, got 2.5"),
        ({"trials": "5"}, "trials: must be a whole number, got '5'"),
        ({"rows": True}, "rows: must be a whole number, got True"),
        ({"timeout": "1"}, "timeout: must be a number, got '1'"),
        ({"study": 1}, "study: must be a text, got 1"),
        ({"root": None}, "root: must be a path, got None"),
        ({"rows": -3, "timeout": -1}, "rows: must be a whole number from 1 to 1000000000, got '-3'"),
        ({"study": "../x"}, "study: must be 1 to 100 letters"),
        ({"device": "tpu"}, "device: must be auto"),
        ({"root": __file__}, "root: must be a folder, got the file "),
        ({"space": 7}, "space: must be a file or a mapping, got int"),
        ({"workload": 3}, "workload: must be a Workload, a function that returns one, or a name, got int"),
        ({"overrides": [1]}, "must be a mapping from places, such as epochs, to values"),
        ({"workload": "", "rows": 0}, "workload: unknown workload ''; known: digits, mnist,"),
    ],
)
def test_a_search_from_python_refuses_what_the_command_line_does(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=re.escape(message)):
        search(**given)


@pytest.mark.usefixtures("root_with_tables")
def test_a_metric_that_is_undefined_ends_no_trial_unless_it_decides(tmp_path: Path) -> None:
    undefined = {"auc": Metric(lambda outputs, targets: torch.tensor(torch.nan), "maximize")}
    workload = dataclasses.replace(tiny_workload(), metrics=undefined)
    given: dict[str, Any] = {"workload": workload, "trials": 2, "root": tmp_path, "device": "cpu", "quiet": True}
    space = {"workload": {"name": "digits"}, **SPACE}
    assert {trial.state for trial in search(space, **given).trials} == {TrialState.COMPLETE}
    decides = {"objective": {"metric": "val/auc", "direction": "maximize"}}
    result = search(space, overrides=decides, **given)
    assert {(trial.state, trial.reason) for trial in result.trials} == {
        (TrialState.DIVERGED, "val/auc became nan after epoch 1")
    }
    assert result.exit_status == 1


def test_a_search_from_python_takes_a_function_and_refuses_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="must be at most the 37 training samples, got 64"):
        search(workload=tiny_workload, root=tmp_path / "new")
    with pytest.raises(InvalidInput, match=re.escape("must return a pipeline.workloads.workload.Workload, got int")):
        search(workload=lambda: 3, root=tmp_path)  # type: ignore[arg-type, return-value]
    assert list(tmp_path.iterdir()) == []


class Block(nn.Module):
    """A residual block with BatchNorm and dropout, under names that no pattern expects."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_parameter("scale-π", nn.Parameter(torch.ones(width)))
        self.norm = nn.BatchNorm2d(width)
        self.linear = nn.Conv2d(width, width, 1)
        self.dropout = nn.Dropout(0.2)

    def forward(self, features: Tensor) -> Tensor:
        """Map features (batch, width, 1, 1) to the same shape."""
        scale = getattr(self, "scale-π").view(1, -1, 1, 1)
        changed: Tensor = features + scale * self.dropout(F.relu(self.linear(self.norm(features))))
        return changed


class Tied(nn.Module):
    """An encoder and a decoder that share one matrix, around a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 8, bias=False)
        self.block = Block(8)
        self.decoder = nn.Linear(8, 6)
        self.decoder.weight = nn.Parameter(self.encoder.weight.detach().T.contiguous())
        self.again = self.block  # a module by two names
        self.head = nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs (batch, 6) to logits (batch, class)."""
        features = self.encoder(inputs)[..., None, None].expand(-1, -1, 2, 2)
        features = self.again(self.block(features)).mean(dim=(2, 3))
        logits: Tensor = self.head(F.linear(features, self.encoder.weight.T) + self.decoder(features))
        return logits


def test_batch_norm_dropout_residuals_ties_and_odd_names_train_the_same_as_rows_and_plain() -> None:
    configs: dict[int, TrialConfig] = {
        number: tiny_config(AdamW(base_lr=rate), Constant(), param_groups=ONE_GROUP)
        for number, rate in enumerate((0.01, 0.03, 0.1))
    }
    trainer = LocalExecutor(tiny_workload(Tied), configs[0], device=CPU, dtype=torch.float64)
    assert trainer.plain_because is None
    rows = trainer.build(configs)
    assert trainer.describe(configs) == "rows 3"
    assert isinstance(trainer.workload, Workload)
    plain = PlainTrials(configs, trainer.workload, device=CPU, dtype=torch.float64)
    for _ in range(4):
        ours, theirs = rows.train_epoch(), plain.train_epoch()
    for number in configs:
        assert ours[number].metrics["val/loss"] == pytest.approx(theirs[number].metrics["val/loss"], rel=1e-9)
        for name, value in plain.model_state(number).items():
            torch.testing.assert_close(rows.model_state(number)[name], value, rtol=1e-9, atol=1e-12)


def test_rows_are_limited_to_what_fits_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing: Callable[[torch.device], int] = lambda device: 0  # noqa: E731
    monkeypatch.setattr("pipeline.training.executor.free_memory", nothing)
    configs = dict.fromkeys(range(5), tiny_config())
    executor = LocalExecutor(tiny_workload(), configs[0], device=CPU)
    assert executor.rules.row_limit == 1
    assert [len(shard.numbers) for shard in executor.place(configs)] == [1] * 5  # one row always fits
