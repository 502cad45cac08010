"""Describe what a study trains besides its space, so that a change of code or data between two runs is noticed."""

from __future__ import annotations

import ast
import functools
import hashlib
import sys
from collections.abc import Iterable
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from pipeline.files.code import is_installed
from pipeline.workloads.data import samples_of
from pipeline.workloads.loop import Loop
from pipeline.workloads.trees import bytes_of, described, map_tensors, tensors
from pipeline.workloads.workload import Samples, Workload

SAMPLES_HASHED = 16
"""Samples of each split, evenly spread, whose values count."""


def fingerprint(workload: Workload | Loop, model: nn.Module, code: Iterable[Any] = ()) -> dict[str, str]:
    """Return each part of a workload with a text that changes with it.

    Parts are the source files of the person's own code, without comments and layout; the splits, by number, shapes and
    some of the values; and the model, by the names and shapes of its parameters and buffers. Of a script that runs,
    only functions and classes count. The data of a training loop is not seen.

    Args:
        workload: A workload that was moved by `to_device`, or a training loop.
        model: Built by the workload.
        code: Optimizers and schedules of the person's own.
    """
    parts = {
        f"code of {path.name}": _digest(_code(path, module))
        for path, module in code_files(workload, model, code).items()
    }
    for name in ("train", "val", "test"):
        if isinstance(workload, Workload) and getattr(workload, name) is not None:
            parts[name] = _described_samples(samples_of(workload, name))
    named = (*model.named_parameters(), *model.named_buffers())
    shapes = "; ".join(f"{name} {described(tensor)} {tensor.dtype}" for name, tensor in named)
    parts["model"] = f"{type(model).__name__} of {len(named)} tensors, {_digest(shapes)}"
    return parts


def code_files(workload: Workload | Loop, model: nn.Module, code: Iterable[Any] = ()) -> dict[Path, ModuleType]:
    """Return the files of the person's own code: of each member, and of what these files import from their folders.

    Args:
        workload: The workload, or a training loop.
        model: Built by the workload.
        code: Optimizers and schedules of the person's own.
    """
    waiting = [module for member in (model, *_members(workload), *code) if (module := _module_of(member))]
    files: dict[Path, ModuleType] = {}
    while waiting:
        module = waiting.pop()
        path = _own_file(module)
        if path is None or path in files:
            continue
        files[path] = module
        used = (value if isinstance(value, ModuleType) else _module_of(value) for value in vars(module).values())
        waiting += [other for other in used if other and (file := _own_file(other)) and file.parent == path.parent]
    return dict(sorted(files.items()))


def _described_samples(samples: Samples) -> str:
    count = len(samples)
    chosen = torch.arange(min(count, SAMPLES_HASHED)) * max(1, count // SAMPLES_HASHED)
    (batch,) = samples.batches([chosen], seed=0)
    one = map_tensors(lambda tensor: tensor[:1], batch.inputs)
    return f"{count} samples of {described(one)}, {_digest(*map(bytes_of, tensors(batch.both)))}"


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()[:16]


def _code(path: Path, module: ModuleType) -> str:
    tree = ast.parse(path.read_bytes())
    if module.__name__ == "__main__":
        tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return ast.dump(tree)


def _members(workload: Workload | Loop) -> list[Any]:
    if isinstance(workload, Loop):
        return [workload.function]
    functions = [workload.build_model, workload.loss, workload.preprocess, workload.augment, workload.collate]
    functions += [workload.order, *(metric.function for metric in workload.metrics.values())]
    return [*functions, workload.train, workload.val]


def _module_of(member: Any) -> ModuleType | None:
    """Return the module that defines a function, a class, or the class of any other value."""
    while isinstance(member, functools.partial):
        member = member.func
    definition = member if isinstance(member, type | FunctionType) else type(member)
    return sys.modules.get(definition.__module__)


def _own_file(module: ModuleType) -> Path | None:
    """Return a module's file, unless the module is of Python, of an installed package or of this one."""
    file = getattr(module, "__file__", None)
    path = Path(file).resolve() if file and file.endswith(".py") else None
    return path if path is not None and path.is_file() and not is_installed(path) else None
