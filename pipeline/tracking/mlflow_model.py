"""Save a trained model as a folder that MLflow loads and serves."""

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle
import mlflow.pytorch
from mlflow.models import infer_signature

ABSENT = frozenset({"pipeline", "torch", "mlflow", "cloudpickle"})
"""Packages that are no further requirement: this one, and those that every model of PyTorch in MLflow requires."""


def save_model(
    model: Any,
    folder: Path,
    *,
    example: tuple[Any, Any] | None,
    code: Mapping[Path, ModuleType],
    about: Mapping[str, Any],
) -> None:
    """Save a model to a folder that does not exist.

    The model is pickled with the code of its classes, so that loading it needs neither this package nor the person's
    files. MLflow's own format would keep the batch size of an example, and inferring requirements would take 15 s.

    Args:
        model: A `torch.nn.Module` on the CPU.
        folder: Where to save it.
        example: Inputs and outputs as arrays (sample, …), or as dicts of them, from which the signature is made; None:
            no signature.
        code: The files of the person's code, which are saved with the model, and their modules.
        about: Plain values to keep with the model.
    """
    with _pickled_by_value([sys.modules["pipeline"], *code.values()]), _without_warnings():
        mlflow.pytorch.save_model(
            model,
            folder,
            signature=False if example is None else infer_signature(*example),
            serialization_format="pickle",
            code_paths=[str(path) for path in code] or None,
            pip_requirements=requirements(model, code),
            metadata=dict(about),
        )


def requirements(model: Any, code: Iterable[Path]) -> list[str]:
    """Return the packages that a model's classes and the person's files import, with their present versions."""
    names = {type(module).__module__.partition(".")[0] for module in model.modules()}
    names |= {name for path in code for name in _imported(path)}
    packages = importlib.metadata.packages_distributions() if names - ABSENT else {}
    distributions = sorted({packages[name][0] for name in names - ABSENT if name in packages})
    versions = [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in distributions]
    return [*mlflow.pytorch.get_default_pip_requirements(), *versions]


def _imported(path: Path) -> Iterator[str]:
    """Yield the packages that a file imports."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


@contextlib.contextmanager
def _pickled_by_value(modules: Iterable[ModuleType]) -> Iterator[None]:
    """Let cloudpickle write the code of these modules, and of those within them, instead of their names."""
    modules = list(modules)
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence MLflow's advice against pickled models."""
    logger = logging.getLogger("mlflow.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
