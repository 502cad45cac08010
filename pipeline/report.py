"""Write the report of a study as one page: `python -m pipeline.report [--study NAME] [--out FILE]`."""

from __future__ import annotations

from typing import NoReturn

from pipeline.app import cli


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    description = "Write the report of a study as one HTML file, which opens without network."
    parser = cli.build_parser("report", description)
    cli.add_root(parser)
    cli.add_storage(parser)
    cli.add_study(parser, help="which study (default: the newest)")
    help = "where to write it (default: report.html in the study's folder)"
    parser.add_argument("--out", type=cli.file, metavar="FILE", help=help)
    arguments = parser.parse_args(argv)

    from pipeline.app.report import report

    return report(arguments.root, arguments.storage, study=arguments.study, out=arguments.out)


def script() -> NoReturn:
    """Run the command line as a console script does, and exit."""
    cli.run(main)


if __name__ == "__main__":
    script()
