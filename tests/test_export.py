"""Configs written as JSON and as code; a model saved with its code."""

from __future__ import annotations

import importlib.abc
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pipeline.export
from pipeline.errors import InvalidInput
from pipeline.files import strict_yaml
from pipeline.files.code import load_module

# MLflow's own, while it is imported.
pytestmark = pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning")

CONFIG: dict[str, Any] = {
    "optimizer": {"sgd": {"base_lr": 0.1}},
    "objective": {"metric": "val/f1", "direction": "maximize"},
    "workload": {"name": "own", "function": "my_task.py:task", "arguments": {"name": "a\u2028b\x85c\x7fd \U0001f600"}},
}


def test_a_metric_that_json_cannot_hold_is_left_out(space_file: Callable[..., Path], capsys: Any) -> None:
    found = {"epochs": 3, "environment": {"placement": []}}
    metrics = {"val/loss": math.nan, "val/f1": 0.5, "train/loss": math.inf}
    config = space_file(**CONFIG, found={**found, "metrics": metrics})
    assert pipeline.export.main([str(config), "--format", "json"]) == 0
    text = capsys.readouterr().out
    expected = {**strict_yaml.load(config), "found": {**found, "metrics": {"val/f1": 0.5}}}
    assert json.loads(text) == expected
    assert strict_yaml.loads(text, source="json") == expected


def test_a_config_by_hand_is_code_without_its_workload_being_loaded(
    space_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = space_file(**CONFIG, scheduler={"plateau": {"metric": "val/f1"}})
    assert pipeline.export.main([str(config), "--format", "python"]) == 0
    code = capsys.readouterr().out
    head = code.partition("\n\nimport torch\n")[0]
    assert head.replace("\n# ", " ") == f"# Written from {config}."
    assert 'lr_scheduler.ReduceLROnPlateau(optimizer, mode="max")' in code


def test_what_depends_on_data_or_a_model_is_no_code(space_file: Callable[..., Path]) -> None:
    groups = {"body": {"layers": ["blocks.{n}.*"], "layer_decay": 0.8}, "head": {"pattern": "*"}}
    schedule = {"cosine": {"interval": "step", "warmup": "5%"}}
    config = space_file(**CONFIG, scheduler=schedule, param_groups=groups)
    with pytest.raises(InvalidInput) as caught:
        pipeline.export.main([str(config), "--format", "python"])
    assert [str(problem) for problem in caught.value.problems] == [
        "scheduler.cosine: a share of the steps depends on the data; write the number of steps, or export a search's "
        "trial",
        "param_groups.body.layers: {n} depends on the model; write each layer, or export a search's trial",
    ]


def test_a_config_is_not_written_over_itself(space_file: Callable[..., Path]) -> None:
    config = space_file(**CONFIG)
    with pytest.raises(InvalidInput, match="is the config itself; name another file"):
        pipeline.export.main([str(config), "--out", str(config)])


NETS = """
import numpy
from torch import nn

class Squash(nn.Module):
    def forward(self, inputs):
        return squashed(inputs)

def squashed(inputs):
    return inputs.tanh()
"""
TASK = """
from torch import nn
from nets_of_export import Squash

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(3, 2), Squash())
"""


class Refused(importlib.abc.MetaPathFinder):
    """Lets nothing import the person's files."""

    def find_spec(self, name: str, *_: Any) -> None:
        if name in ("custom_task_of_export", "nets_of_export"):
            raise ImportError(f"{name} must not be needed")


def test_a_saved_model_loads_without_the_files_of_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    from pipeline.tracking.mlflow_model import save_model

    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "nets_of_export.py").write_text(NETS)
    (tmp_path / "task_of_export.py").write_text(TASK)
    module, name = load_module(f"{tmp_path}/task_of_export.py:Net", place="")
    model = getattr(module, name)()
    inputs = torch.randn(2, 3)
    code = {Path(other.__file__ or ""): other for other in (module, sys.modules["nets_of_export"])}
    example = (inputs.numpy(), model(inputs).detach().numpy())
    save_model(model, tmp_path / "model", example=example, code=code, about={"trial": 3})
    for other in code.values():
        monkeypatch.delitem(sys.modules, other.__name__)
    monkeypatch.setattr(sys, "meta_path", [Refused(), *sys.meta_path])
    loaded = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    for size in (1, 5):
        batch = torch.randn(size, 3)
        torch.testing.assert_close(torch.from_numpy(loaded.predict(batch.numpy())), model(batch).detach())
    assert loaded.metadata.metadata == {"trial": 3}
    assert sorted(path.name for path in (tmp_path / "model" / "code").glob("*.py")) == [
        path.name for path in sorted(code)
    ]
    required = (tmp_path / "model" / "requirements.txt").read_text().split()
    assert [line.partition("==")[0] for line in required] == ["mlflow", "torch", "cloudpickle", "numpy"]
    assert all("+" not in line for line in required)
