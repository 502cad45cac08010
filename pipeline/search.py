"""Search learning-rate strategies: `python -m pipeline.search --trials 50`, or `search` from Python.

Read on in `pipeline.app`: `options` turns options into a search space, `run_search` asks the study for trials, has them
trained, tells MLflow, and writes best.yaml.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn

from pipeline.app import cli

if TYPE_CHECKING:
    from pipeline.app.result import SearchResult
    from pipeline.space.overrides import Overrides
    from pipeline.workloads.loop import Epochs
    from pipeline.workloads.workload import Workload

EXAMPLES = (
    "--trials 50",
    "--workload my_task.py:sine --trials 20",
    "--space decay --set epochs=40 --set workload.model=mlp --study long",
)
"""Options that `--help` shows."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    arguments = _parse(argv)
    if arguments.delete is not None:
        from pipeline.app.delete import delete

        return delete(arguments.root, arguments.storage, arguments.delete, sure=arguments.yes)

    from pipeline.app.start_search import start_search

    return start_search(
        space=arguments.space,
        workload=None,
        overrides=cli.overrides_of(arguments),
        trials=arguments.trials,
        timeout=arguments.timeout,
        study=arguments.study,
        root=arguments.root,
        storage=arguments.storage,
        device=arguments.device,
        rows=arguments.rows,
        workers=arguments.workers,
        ray=arguments.ray,
        cpus_per_worker=arguments.cpus_per_worker,
        changed_code=arguments.changed_code,
        confirm={"share": 0.0} if arguments.no_confirm else {},
        from_python=False,
    ).exit_status


def search(
    space: Path | str | Mapping[str, Any] | None = None,
    *,
    workload: Callable[..., Workload | Epochs] | Workload | str | None = None,
    overrides: Overrides = MappingProxyType({}),
    trials: int | None = None,
    timeout: float | None = None,
    study: str | None = None,
    root: Path | str = ".",
    storage: str | None = None,
    device: str = "auto",
    rows: int | None = None,
    workers: int | None = None,
    ray: str | None = None,
    cpus_per_worker: int | None = None,
    changed_code: bool = False,
    confirm: bool = True,
    quiet: bool = False,
) -> SearchResult:
    """Run or continue a search, as the command line does.

    Args:
        space: A search-space file, the name of a ready-made space, or the content of a file; None: a ready-made space.
        workload: Replaces the space's: a workload, a function that returns one, a training loop, or a name as
            `--workload` takes.
        overrides: Changes to the space, dotted place to value, such as `{"optimizer.sgd.base_lr.high": 0.5}`.
        trials: In total; None: as many as the study was last asked for, or 50.
        timeout: In minutes.
        study: Name of the study to continue or to begin.
        root: Folder that holds `mlflow.db` and `mlruns/`; made if it does not exist.
        storage: URL of a PostgreSQL database that holds the ended trials, without its password; None:
            PIPELINE_STORAGE, or else `mlruns/optuna.db`.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        rows: At most this many trials in a matrix; None: as many as train fastest.
        workers: Train on this many GPUs of the machine at a time, or in this many shares of its cores; None: on one
            device, or on all of the cluster that `ray` names.
        ray: Address of a Ray cluster.
        cpus_per_worker: Cores of each worker; None: the cores of a machine divided by its workers.
        changed_code: Go on with a study although the workload's code, data or model has changed.
        confirm: Confirm the best trials at the end, as the space says; False: do not.
        quiet: Print nothing.

    Raises:
        PipelineError: As `pipeline.errors` draws them; `InvalidInput` with every problem of the arguments.
    """
    from pipeline.app.start_search import start_search

    return start_search(
        space=space,
        workload=workload,
        overrides=overrides,
        trials=trials,
        timeout=timeout,
        study=study,
        root=root,
        storage=storage,
        device=device,
        rows=rows,
        workers=workers,
        ray=ray,
        cpus_per_worker=cpus_per_worker,
        changed_code=changed_code,
        confirm={} if confirm else {"share": 0.0},
        from_python=True,
        quiet=quiet,
    )


def _parse(argv: list[str] | None) -> argparse.Namespace:
    more = [*cli.choices_of_spaces(), "", "examples:", *(f"  python -m pipeline.search {words}" for words in EXAMPLES)]
    parser = cli.build_parser("search", "Search learning-rate strategies.", more=more)
    cli.add_space(parser)
    help = "in total (default: what the study was last asked for, or 50)"
    parser.add_argument("--trials", type=cli.whole_number(1), metavar="N", help=help)
    parser.add_argument("--timeout", type=cli.positive_number, metavar="MINUTES", help="stop after this long")
    cli.add_study(parser, help="continue this study, or begin it (default: the newest unfinished one that fits)")
    cli.add_root(parser, help="folder that holds mlflow.db and mlruns/, made if need be")
    cli.add_storage(parser)
    cli.add_device(parser)
    rows_help = "train at most N trials as rows of one matrix (default: auto)"
    parser.add_argument("--rows", type=_rows, metavar="auto|N", help=rows_help)
    cli.add_workers(parser)
    help = "go on with a study although the code, data or model of its workload has changed"
    parser.add_argument("--changed-code", action="store_true", help=help)
    help = "do not train the best trials and two baselines again with fresh seeds at the end"
    parser.add_argument("--no-confirm", action="store_true", help=help)
    cli.add_delete(parser)
    return parser.parse_args(argv)


def _rows(text: str) -> int | None:
    return None if text == "auto" else cli.whole_number(1)(text)


def script() -> NoReturn:
    """Run the command line as a console script does, and exit."""
    cli.run(main)


if __name__ == "__main__":
    script()
