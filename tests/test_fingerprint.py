"""The fingerprint of a workload: what changes it and what does not."""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path

import torch
from tiny import TinyModel, on_device, tiny_workload

from pipeline.space.config import Own
from pipeline.study.store import fingerprint_changes
from pipeline.workloads.custom import custom_workload
from pipeline.workloads.fingerprint import fingerprint
from pipeline.workloads.workload import Split, Workload

CPU = torch.device("cpu")
TASK = '''"""A task."""
import torch
from torch import nn
from pipeline.workloads.workload import Split, Workload
from parts_of_task import loss


def task() -> Workload:
    x = torch.arange(40.0).view(20, 2)
    # a comment
    return Workload(name="task", build_model=lambda: nn.Linear(2, 1), train=Split(x, x), val=Split(x, x), loss=loss)
'''
PARTS = "def loss(outputs, targets):\n    return (outputs - targets).abs().mean()\n"


def parts_of(workload: Workload) -> dict[str, str]:
    return fingerprint(on_device(workload, device=CPU), workload.build_model())


def of_files(folder: Path, *, task: str = TASK, parts: str = PARTS) -> dict[str, str]:
    """Return the fingerprint of a workload in a file that imports from a second file beside it."""
    (folder / "task.py").write_text(task)
    (folder / "parts_of_task.py").write_text(parts)
    sys.modules.pop("parts_of_task", None)
    workload = custom_workload(Own(function=f"{folder / 'task.py'}:task"))
    assert isinstance(workload, Workload)
    return parts_of(workload)


def test_a_change_of_code_is_found_in_the_file_and_in_files_beside_it(tmp_path: Path) -> None:
    before = of_files(tmp_path)
    assert {"code of task.py", "code of parts_of_task.py"} <= before.keys()
    assert not list(
        fingerprint_changes(before, of_files(tmp_path, task=TASK.replace("# a comment\n", "# another comment\n\n")))
    )
    other_loss = of_files(tmp_path, parts=PARTS.replace("abs()", "square()"))
    assert list(fingerprint_changes(before, other_loss)) == [("code of parts_of_task.py", "has changed")]


def test_other_data_and_another_model_are_found() -> None:
    workload = tiny_workload()
    assert isinstance(workload.val, Split)
    before = parts_of(workload)
    assert not list(fingerprint_changes(before, parts_of(tiny_workload())))
    more = dataclasses.replace(workload, val=workload.val.take(torch.arange(19)))
    was, now = "was 20 samples of (1, 6)", "is 19 samples of (1, 6)"
    assert list(fingerprint_changes(before, parts_of(more))) == [("val", f"{was} and {now}")]
    other = dataclasses.replace(workload, val=Split(workload.val.inputs + 1, workload.val.targets))
    assert list(fingerprint_changes(before, parts_of(other))) == [("val", "has changed")]
    with_norm = parts_of(tiny_workload(functools.partial(TinyModel, batch_norm=True)))
    assert list(fingerprint_changes(before, with_norm)) == [
        ("model", "was TinyModel of 4 tensors and is TinyModel of 9 tensors")
    ]
