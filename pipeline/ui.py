"""MLflow's web page on the runs of this project, with a link to the view that compares trials: `python -m pipeline.ui`.

A bare `mlflow ui` in the same folder shows the same runs.
"""

from __future__ import annotations

from typing import NoReturn

from pipeline.app import cli


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = cli.build_parser("ui", "Compare trials in MLflow's web page.")
    cli.add_root(parser, help="folder that holds mlflow.db")
    help = "port on this machine (default: 5000)"
    parser.add_argument("--port", type=cli.whole_number(1, 65535), default=5000, metavar="N", help=help)
    arguments = parser.parse_args(argv)

    from pipeline.app.mlflow_page import serve_page

    return serve_page(arguments.root, port=arguments.port)


def script() -> NoReturn:
    """Run the command line as a console script does, and exit."""
    cli.run(main)


if __name__ == "__main__":
    script()
