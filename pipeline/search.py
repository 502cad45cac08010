"""Search learning-rate strategies: `python -m pipeline.search --trials 50`, or `search` from Python.

`search` reads a search space, asks the study for trials, turns each into a TrialConfig, splits the model into
parameter groups, builds optimizers and schedulers, trains epochs, reports metrics to the study and to MLflow, and
exports best.yaml.
"""

from __future__ import annotations

import argparse

from pipeline.app import cli
from pipeline.app.options import DEFAULT_TRIALS, options_of
from pipeline.app.run_search import run_search, search

__all__ = ["main", "search"]


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    arguments = _parse(argv)
    if arguments.delete is not None:
        from pipeline.app.delete import delete

        return delete(arguments.root, arguments.delete, sure=arguments.yes)
    from rich.console import Console

    return run_search(options_of(arguments), Console(highlight=False, markup=False)).exit_status


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m pipeline.search", description="Search learning-rate strategies.")
    cli.add_space(parser)
    at_least_one = cli.whole_number(1)
    parser.add_argument("--trials", type=at_least_one, metavar="N", help=f"in total (default: {DEFAULT_TRIALS})")
    parser.add_argument("--timeout", type=cli.positive_number, metavar="MINUTES", help="stop after this long")
    cli.add_study(parser, help="go on with this study, or begin it (default: the newest unfinished one that fits)")
    cli.add_root(parser)
    cli.add_device(parser)
    rows_help = "train at most N trials as rows of one matrix, which changes no result (default: auto)"
    parser.add_argument("--rows", type=_rows, metavar="auto|N", help=rows_help)
    parser.add_argument("--seed", type=cli.whole_number(0, 2**32 - 1), metavar="N", help="instead of the file's")
    cli.add_delete(parser)
    return parser.parse_args(argv)


def _rows(text: str) -> int | None:
    return None if text == "auto" else cli.whole_number(1)(text)


if __name__ == "__main__":
    cli.run(main)
