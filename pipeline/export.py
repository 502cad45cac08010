"""Write a trial as a file that trains again: `python -m pipeline.export [--study NAME] [--trial N] [--out FILE]`."""

from __future__ import annotations

from typing import NoReturn

from pipeline.app import cli


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    description = "Write a trial as a file that trains again."
    parser = cli.build_parser("export", description)
    cli.add_root(parser)
    cli.add_study(parser, help="which study (default: the newest)")
    parser.add_argument("--trial", type=cli.whole_number(0), metavar="N", help="which trial (default: the best)")
    parser.add_argument("--out", type=cli.file, metavar="FILE", help="where to write it (default: the terminal)")
    arguments = parser.parse_args(argv)

    from pipeline.app.best_yaml import export

    return export(arguments.root, study=arguments.study, trial=arguments.trial, out=arguments.out)


def script() -> NoReturn:
    """Run the command line as a console script does, and exit."""
    cli.run(main)


if __name__ == "__main__":
    script()
