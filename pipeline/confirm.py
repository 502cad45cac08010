"""Confirm the best trials of a study: `python -m pipeline.confirm`, or `confirm` from Python.

A search does so at its end, within a share of its epochs. This command has no such limit, and takes more seeds or
finalists; it trains only what is missing.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pipeline.app import cli

if TYPE_CHECKING:
    from pipeline.app.result import SearchResult
    from pipeline.workloads.loop import Epochs
    from pipeline.workloads.workload import Workload


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    arguments = _parse(argv)
    return _confirm(
        space=arguments.space,
        workload=None,
        overrides=cli.overrides_of(arguments),
        settings={"seeds": arguments.seeds, "finalists": arguments.finalists},
        study=arguments.study,
        timeout=arguments.timeout,
        root=arguments.root,
        storage=arguments.storage,
        device=arguments.device,
        workers=arguments.workers,
        ray=arguments.ray,
        cpus_per_worker=arguments.cpus_per_worker,
        from_python=False,
    ).exit_status


def confirm(
    study: str | None = None,
    *,
    seeds: int | None = None,
    finalists: int | None = None,
    space: Path | str | Mapping[str, Any] | None = None,
    workload: Callable[..., Workload | Epochs] | Workload | str | None = None,
    timeout: float | None = None,
    root: Path | str = ".",
    storage: str | None = None,
    device: str = "auto",
    workers: int | None = None,
    ray: str | None = None,
    cpus_per_worker: int | None = None,
    quiet: bool = False,
) -> SearchResult:
    """Confirm the best trials of a study, as the command line does.

    Args:
        study: Name of the study; None: the newest.
        seeds: Number of fresh seeds; None: as the study's space says.
        finalists: Number of trials to confirm; None: as the study's space says.
        space: The study's space again, if it has optimizers or schedules of your own.
        workload: The study's workload again, if it is your own.
        timeout: In minutes.
        root: Folder that holds `mlflow.db` and `mlruns/`.
        storage: URL of the PostgreSQL database that holds the study's trials, without its password; None:
            PIPELINE_STORAGE, or else `mlruns/optuna.db`.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        workers: As in `pipeline.search.search`; each trains the runs of a seed at a time.
        ray: The same.
        cpus_per_worker: The same.
        quiet: Print nothing.

    Raises:
        PipelineError: As `pipeline.errors` draws them; `InvalidInput` with every problem of the arguments.
    """
    from pipeline.app.options import read_options

    given = {"study": study, "root": root, "storage": storage, "seeds": seeds, "finalists": finalists}
    read = read_options("confirm", given, workload=None, overrides={}, problems=[])
    return _confirm(
        space=space,
        workload=workload,
        overrides={},
        settings={"seeds": read["seeds"], "finalists": read["finalists"]},
        study=read["study"],
        timeout=timeout,
        root=read["root"],
        storage=read["storage"],
        device=device,
        workers=workers,
        ray=ray,
        cpus_per_worker=cpus_per_worker,
        from_python=True,
        quiet=quiet,
    )


def _confirm(
    *, study: str | None, root: Path, storage: str | None, settings: Mapping[str, int | None], **given: Any
) -> SearchResult:
    from pipeline.app.start_search import start_search
    from pipeline.study.store import Store

    changes = {name: value for name, value in settings.items() if value is not None}
    storage = cli.chosen_storage(storage)
    with contextlib.closing(Store(root, storage)) as store:
        study = store.header(study).name
    return start_search(
        confirm={"share": 1.0, **changes},
        study=study,
        root=root,
        storage=storage,
        trials=None,
        rows=None,
        changed_code=False,
        confirming=True,
        **given,
    )


def _parse(argv: list[str] | None) -> argparse.Namespace:
    description = "Train the best trials of a study, and two baselines, again with fresh seeds."
    parser = cli.build_parser("confirm", description)
    cli.add_study(parser, help="which study (default: the newest)")
    default = "(default: as the study's space says, or 3)"
    parser.add_argument("--seeds", type=cli.SEEDS, metavar="N", help=f"fresh seeds {default}")
    parser.add_argument("--finalists", type=cli.FINALISTS, metavar="N", help=f"trials to confirm {default}")
    parser.add_argument("--timeout", type=cli.positive_number, metavar="MINUTES", help="stop after this long")
    cli.add_root(parser)
    cli.add_storage(parser)
    cli.add_device(parser)
    cli.add_workers(parser)
    cli.add_space(parser)
    return parser.parse_args(argv)


def script() -> NoReturn:
    """Run the command line as a console script does, and exit."""
    cli.run(main)


if __name__ == "__main__":
    script()
