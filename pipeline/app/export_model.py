"""Train a config and write its model as a folder that MLflow loads and serves."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.app import cli
from pipeline.errors import InvalidInput, Problem
from pipeline.space.load import FOUND

if TYPE_CHECKING:
    from pipeline.app.train_config import Trained


def checked_folder(out: Path | None) -> Path:
    """Return the absolute path of a folder to be made, before any work is done for it.

    Raises:
        InvalidInput: It cannot be made, or something is there.
    """
    if out is None:
        raise InvalidInput("--out", [Problem("", "is missing: a model is a folder; add --out DIR")])
    folder = out.absolute()
    if not folder.parent.is_dir():
        raise InvalidInput("--out", [Problem(str(out), f"there is no folder {folder.parent}; make it first")])
    if folder.is_symlink() or folder.exists():
        raise InvalidInput("--out", [Problem(str(out), "exists already; name another, or remove it")])
    cli.refuse_unwritable(folder, "--out")
    return folder


def export_model(content: Mapping[str, Any], file: Path | None, *, folder: Path, shown: Path, device: str) -> int:
    """Train a config and save its model; return the exit status.

    Args:
        content: The config, with what a search recorded.
        file: The config's file; None: the config is a trial's.
        folder: Where to save the model; does not exist.
        shown: The same as it was given.
        device: Where to train, as `--device` takes it.

    Raises:
        InvalidInput: The config does not suit its workload, or the folder cannot be written.
        TrainingEnded: The config diverged, or its model, loss or metric raised.
    """
    from pipeline.app.start_training import start_training

    trained = start_training(
        content if file is None else file, None, overrides={}, device=device, fast=False, test=False, say=print
    )
    found = content.get(FOUND, {})
    about = {name: found[name] for name in ("study", "trial") if name in found} | {"metrics": dict(trained.metrics)}
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
            _save(trained, Path(scratch) / folder.name, about)
            (Path(scratch) / folder.name).rename(folder)
    except OSError as error:
        raise InvalidInput("--out", [Problem(str(shown), f"cannot be written: {error.strerror}")]) from None
    load = f"mlflow.pytorch.load_model({str(shown)!r}) or mlflow models serve -m {cli.quoted(shown)}"
    print(f"model         {shown}   {load}")
    return 0


def _save(trained: Trained, folder: Path, about: Mapping[str, Any]) -> None:
    from pipeline.tracking.mlflow_model import save_model
    from pipeline.workloads.example import example_of
    from pipeline.workloads.fingerprint import code_files

    example = example_of(trained.workload, trained.model)
    code = code_files(trained.workload, trained.model)
    save_model(trained.model, folder, example=example, code=code, about=about)
