"""A trial as a file that trains again: its config, and what the search found with it.

python -m pipeline.export [--study NAME] [--trial N] [--out FILE]
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from pipeline.app import cli
from pipeline.app.best_yaml import choose_trial, config_file
from pipeline.errors import InvalidInput, Problem

if TYPE_CHECKING:
    pass


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.export", description="Write a trial as a file that trains again."
    )
    cli.add_root(parser)
    cli.add_study(parser, help="which study (default: the newest)")
    parser.add_argument("--trial", type=cli.whole_number(0), metavar="N", help="which trial (default: the best)")
    parser.add_argument("--out", type=cli.file, metavar="FILE", help="where to write it (default: the terminal)")
    arguments = parser.parse_args(argv)

    from pipeline.files.atomic import write_atomic
    from pipeline.study.store import Store

    if arguments.out is not None:
        cli.refuse_out(arguments.out)
    study = Store(arguments.root).open(arguments.study)
    text = config_file(study, choose_trial(study, arguments.trial))
    if arguments.out is None:
        sys.stdout.write(text)
        return 0
    try:
        write_atomic(arguments.out.resolve(), text)
    except OSError as error:
        raise InvalidInput("--out", [Problem(str(arguments.out), f"cannot be written: {error.strerror}")]) from None
    print(f"{arguments.out}   train it: python -m pipeline.train {cli.quoted(arguments.out)}")
    return 0


if __name__ == "__main__":
    cli.run(main)
