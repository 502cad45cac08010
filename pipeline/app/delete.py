"""`python -m pipeline.search --delete NAME`: delete a study with everything that belongs to it."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from pipeline.app import cli
from pipeline.errors import InvalidInput, Problem, StorageError, counted
from pipeline.files.locks import folder_locked
from pipeline.study.store import Store
from pipeline.tracking.process import TRACKERS
from pipeline.tracking.tracker import root_cause


def delete(root: Path, storage: str | None, name: str, *, sure: bool) -> int:
    """Delete a study's trials, folder and record at every tracker; ask first unless `sure`.

    The records are deleted first and the trials last, so that the same command completes an interrupted deletion.

    Returns:
        The exit status: 1 if the answer was no.

    Raises:
        InvalidInput: There is no such study, or nobody to ask.
        StudyBusy: A search of the study is running.
        StorageError: Something could not be removed.
    """
    with contextlib.closing(Store(root, cli.chosen_storage(storage), warn=cli.warn)) as store:
        return _delete(store, name, sure=sure)


def _delete(store: Store, name: str, *, sure: bool) -> int:
    trackers = [build(store.root) for build in TRACKERS]
    header = store.header(name, option="--delete")
    store.refuse_another_record(name, "--delete")
    records = " and ".join(map(str, trackers))
    what = f"study {name}: {counted(header.ended, 'trial')}"
    if store.folder(name).exists():
        what += f", {store.folder(name)}, and the study's record, {records}"
    else:  # trained below another root, with its trials in the same PostgreSQL database
        what += f" in {store.place}, and what {records} has of it; files below another root stay"
    if not sure and not _agreed(name, what):
        print("nothing was deleted")
        return 1
    with store.lock(name), folder_locked(store.folder(name)):  # a search that was killed leaves its tracker process
        for tracker in trackers:
            try:
                for warning in tracker.delete(name, identity=header.identity):
                    cli.warn(warning)
            except Exception as error:
                raise StorageError(f"{tracker}: {root_cause(error)}; study {name} is still there") from error
        store.delete(name)
    print(f"deleted {what}")
    return 0


def _agreed(name: str, what: str) -> bool:
    if not sys.stdin.isatty():
        remedy = "nobody can be asked, since the input is no terminal; add --yes to delete it without asking"
        raise InvalidInput("--delete", [Problem(name, remedy)])
    try:
        return input(f"delete {what}? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:  # Ctrl-D
        print()
        return False
