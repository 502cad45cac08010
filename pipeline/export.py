"""Write a trial as a config, as code or as a model: `python -m pipeline.export --format python --out train_it.py`."""

from __future__ import annotations

import argparse
from typing import NoReturn

from pipeline.app import cli

FORMATS = ("yaml", "json", "python", "mlflow")


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    description = "Write a trial of a search, or a config, as a file that trains again, as code or as a trained model."
    parser = argparse.ArgumentParser(prog="python -m pipeline.export", description=description)
    help = "a config's file, such as best.yaml (default: a trial of a study)"
    parser.add_argument("config", nargs="?", type=cli.file, metavar="CONFIG", help=help)
    cli.add_root(parser)
    cli.add_study(parser, help="which study (default: the newest)")
    parser.add_argument("--trial", type=cli.whole_number(0), metavar="N", help="which trial (default: the best)")
    help = "yaml or json: a config that trains again; python: plain PyTorch code that does not need this package; "
    help += "mlflow: the model, trained again, as a folder that MLflow loads and serves (default: yaml)"
    parser.add_argument("--format", choices=FORMATS, default="yaml", help=help)
    help = "where to write it (default: the terminal); with mlflow a folder that does not exist"
    parser.add_argument("--out", type=cli.file, metavar="PATH", help=help)
    cli.add_device(parser, help="where mlflow's model is trained: ")
    arguments = parser.parse_args(argv)
    if arguments.config is not None and (arguments.study is not None or arguments.trial is not None):
        parser.error("CONFIG is a config by itself; leave --study and --trial away")

    from pipeline.app.export import export

    return export(
        arguments.config,
        root=arguments.root,
        study=arguments.study,
        trial=arguments.trial,
        format=arguments.format,
        out=arguments.out,
        device=arguments.device,
    )


def script() -> NoReturn:
    """Run the command line as a console script does, and exit."""
    cli.run(main)


if __name__ == "__main__":
    script()
