"""Crash a search before or after a chosen call, as SIGKILL would, and search again: `crash.py FOLDER`.

Each crash point has a folder of its own. There a search in a forked process exits at the point, and another search
continues. Prints a JSON object: crash point to exit statuses, outcomes of the second search, and temporary files left.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import torch
from test_checkpoint import DOCUMENT, TRIALS, begin, outcomes, search

import pipeline.study.database
import pipeline.study.sqlite
import pipeline.study.study
from pipeline.space.load import space_from_document
from pipeline.study.store import Store

DIED = 99
"""Exit status of a process that exited at its crash point."""
CALLS: dict[str, tuple[Any, str, tuple[int, ...]]] = {
    "build the database": (pipeline.study.sqlite, "build_database", (1,)),
    "create the study": (pipeline.study.database.Database, "create_study", (1,)),
    "store a group": (optuna.study.Study, "set_user_attr", (1,)),
    "store a trial": (pipeline.study.study.Study, "add", (1, 4, 5, TRIALS)),
    "make the temporary file": (tempfile, "mkstemp", (3,)),
    "open the temporary file": (os, "fdopen", (3,)),
    "sync": (os, "fsync", (5, 6)),  # the third checkpoint's file, and its folder
    "rename": (pathlib.Path, "replace", (4,)),  # after the database's own
    "remove": (pathlib.Path, "unlink", (1, 3)),  # a checkpoint that is too old, and one of a group that has ended
}
"""Description of a call to the owner of the function, the function's name, and the counts of its calls to crash at."""
POINTS = [f"{when} {call} {n}" for call, (_, _, ns) in CALLS.items() for n in ns for when in ("before", "after")]
WHOLE = "never"
"""Key of the search that does not crash."""


def main(folder: Path) -> None:
    """Run every crash point, two at a time, and print the results."""
    torch.set_num_threads(1)  # a fork would lack the threads of this process
    roots = {point: folder / point.replace(" ", "-") for point in (WHOLE, *POINTS)}
    for root in roots.values():
        root.mkdir()
    whole_search(roots[WHOLE])  # forks inherit the imports and caches of this first search
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = dict(zip(roots, pool.starmap(run, roots.items(), chunksize=1), strict=True))
    print(json.dumps(found))


def run(point: str, root: Path) -> dict[str, Any]:
    """Crash a search at a point, continue it, and return the results."""
    died = in_a_fork(lambda: crash_at(point, root))
    again = in_a_fork(lambda: whole_search(root))
    ended = (root / "outcomes").read_text() if (root / "outcomes").exists() else ""
    left = [path.name for path in root.rglob("*") if path.suffix in (".tmp", ".pt", ".new")]
    return {"died": died, "again": again, "outcomes": ended, "left": left}


def in_a_fork(function: Callable[[], None]) -> int:
    """Run a function in a copy of this process, and return its exit status."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        function()
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)


def crash_at(point: str, root: Path) -> None:
    """Search, and exit before or after the call that a crash point names."""
    if point == WHOLE:
        return
    when, *words, n = point.split()
    owner, name, _ = CALLS[" ".join(words)]
    original, calls = getattr(owner, name), iter(range(1, 1_000_000))

    def counted(*arguments: Any, **options: Any) -> Any:
        here = next(calls) == int(n)
        if here and when == "before":
            os._exit(DIED)
        result = original(*arguments, **options)
        if here:
            os._exit(DIED)
        return result

    setattr(owner, name, counted)
    whole_search(root)


def whole_search(root: Path) -> None:
    """Search as the command line does, with a checkpoint after every epoch, and write the outcomes of the trials."""
    store, space = Store(root), space_from_document(DOCUMENT, name="tiny")
    with store.lock("mine"):
        _, exists = store.choose(space, trials=TRIALS, name="mine")
        if not exists:
            begin(store)
        _, warnings = search(store)
    assert warnings == []
    (root / "outcomes").write_text(repr(outcomes(store)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
