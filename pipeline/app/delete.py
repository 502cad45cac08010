"""`python -m pipeline.search --delete NAME`: a study goes, with all that belongs to it."""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline.errors import InvalidInput, Problem, StorageError
from pipeline.files.locks import hold
from pipeline.study.store import Store
from pipeline.tracking.mlflow import cause_of, delete_study


def delete(root: Path, name: str, *, sure: bool) -> int:
    """Delete a study's trials, folder and MLflow runs with their files; ask first, unless told to be sure.

    MLflow's part goes first and the trials last, so that the same command goes on with a deletion that was cut short.

    Returns:
        The exit status: 1 if the answer was no.

    Raises:
        InvalidInput: There is no such study, or nobody to ask.
        StudyBusy: A search drives it.
        StorageError: Something could not be removed.
    """
    store = Store(root)
    header = store.header(name, option="--delete")
    what = f"study {name}: {header.ended} trials, {store.folder(name)}, and its runs in MLflow with their files"
    if not sure and not _agreed(name, what):
        print("nothing was deleted")
        return 1
    with store.lock(name), hold(store.folder(name)):  # MLflow's process may outlive a search that was killed
        try:
            delete_study(root, name=name, identity=header.identity)
        except Exception as error:
            raise StorageError(f"MLflow: {cause_of(error)}; study {name} is still there") from error
        store.delete(name)
    print(f"deleted {what}")
    return 0


def _agreed(name: str, what: str) -> bool:
    if not sys.stdin.isatty():
        remedy = "nobody can be asked, since the input is no terminal; add --yes to delete it all the same"
        raise InvalidInput("--delete", [Problem(name, remedy)])
    try:
        return input(f"delete {what}? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:  # Ctrl-D
        print()
        return False
