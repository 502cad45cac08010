"""Start a search: read its options, start MLflow's process, then import PyTorch and run."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from pipeline.app import cli
from pipeline.app.display import build_console, busy
from pipeline.app.options import read_search
from pipeline.tracking.process import TrackerProcess

if TYPE_CHECKING:
    from pipeline.app.result import SearchResult


def start_search(*, quiet: bool = False, **given: Any) -> SearchResult:
    """Run or continue a search; `pipeline.app.options.read_search` takes the other arguments."""
    options = read_search(**given)
    cli.refuse_root(options.folder, "mlruns/optuna.db" if options.storage is None else "mlruns/studies/new")
    console = build_console(quiet=quiet)
    with contextlib.closing(TrackerProcess(options.folder, warn=cli.warn)) as tracker:
        with busy(console, "loading PyTorch and Optuna"):
            # Here, not above: bad options are refused without the seconds that these imports take, and the tracker's
            # process imports MLflow at the same time.
            from pipeline.app.run_search import run_search
            from pipeline.study.store import Store
        with contextlib.closing(Store(options.folder, options.storage, warn=cli.warn)) as store:
            return run_search(options, store, tracker, console)
