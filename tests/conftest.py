"""A small search space that tests change one section of."""

from __future__ import annotations

import os
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.files.strict_yaml import dumps

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell has it for `make test &`, and children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.pop("PIPELINE_STORAGE", None)  # a database of the person's, to which no test may write

SMALL: dict[str, Any] = {
    "workload": {"name": "digits", "model": "mlp"},
    "epochs": 4,
    "batch_size": 64,
    "optimizer": {"sgd": {"base_lr": {"low": 1e-3, "high": 1.0, "log": True}}},
    "scheduler": {"constant": {}},
    "param_groups": {"all": {"pattern": "*"}},
}


SLOW_FIXTURES = {"test_delete", "test_objective", "test_postgres", "test_python", "test_ray", "test_search"}
"""Modules whose tests share a whole search, which is made once if `pytest -n auto` runs them in one process."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in SLOW_FIXTURES:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.fixture(scope="session")
def mlflow_tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of MLflow without experiments, whose tables take seconds to create; copy it into a search's root."""
    path = tmp_path_factory.mktemp("tables") / "mlflow.db"
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def root_with_tables(mlflow_tables: Path, tmp_path: Path) -> Path:
    """A folder for a search, with MLflow's tables."""
    shutil.copy(mlflow_tables, tmp_path)
    return tmp_path


@pytest.fixture
def space_file(tmp_path: Path) -> Callable[..., Path]:
    """Write the small space, with whole sections replaced or added, to a file."""

    def write(**sections: Any) -> Path:
        path = tmp_path / "space.yaml"
        path.write_text(dumps({**SMALL, **sections}))
        return path

    return write


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Let PyTorch compute with one thread: several wait for each other where other tests run beside."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
