"""The learning-rate range test: `python -m pipeline.lr_range --space FILE`.

Trains every optimizer of a search space at a log grid of rates for a few steps, draws loss against rate, says one rate
to begin with, and proposes bounds of `base_lr`, which `--write` puts into the file. The last line is the next command.
"""

from __future__ import annotations

import argparse
from typing import NoReturn

from pipeline.app import cli


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    arguments = _parse(argv)

    from pipeline.app.range_options import read_range_test

    options = read_range_test(arguments)  # refuses bad input before the seconds that PyTorch's import takes

    from pipeline.app.run_range_test import run_range_test

    return run_range_test(options)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.build_parser("lr_range", "Find a rate to begin with, and bounds for base_lr.")
    cli.add_space(parser)
    parser.add_argument("--write", action="store_true", help="put the proposed bounds into the file of --space")
    cli.add_root(parser, help="folder whose mlruns/ gets the picture, made if need be")
    cli.add_device(parser)
    arguments = parser.parse_args(argv)
    if arguments.write and arguments.space is None:
        parser.error("--write needs --space FILE, the file to put the bounds into")
    return arguments


def script() -> NoReturn:
    """Run the command line as a console script does, and exit."""
    cli.run(main)


if __name__ == "__main__":
    script()
