"""Write a trial as a config, as code or as a model: `python -m pipeline.export --format python --out train_it.py`."""

from __future__ import annotations

from typing import NoReturn

from pipeline.app import cli

FORMATS = ("yaml", "json", "python", "mlflow")


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    description = "Write a trial of a search, or a config, as a file that trains again, as code or as a trained model."
    parser = cli.build_parser("export", description)
    help = "a config's file, such as best.yaml (default: a trial of a study)"
    parser.add_argument("config", nargs="?", type=cli.file, metavar="CONFIG", help=help)
    cli.add_root(parser)
    cli.add_storage(parser)
    cli.add_study(parser, help="which study (default: the newest)")
    help = "which trial, or adam or sgd for a baseline of the confirmation (default: the winner)"
    parser.add_argument("--trial", type=_trial, metavar="N", help=help)
    help = "the trial's run of the confirmation with this seed"
    parser.add_argument("--seed", type=cli.whole_number(0, cli.MAX_SEED), metavar="N", help=help)
    help = "yaml or json: a config that trains again; python: plain PyTorch code that does not need this package; "
    help += "mlflow: the model, trained again, as a folder that MLflow loads and serves (default: yaml)"
    parser.add_argument("--format", choices=FORMATS, default="yaml", help=help)
    help = "where to write it (default: the terminal); with mlflow a folder that does not exist"
    parser.add_argument("--out", type=cli.file, metavar="PATH", help=help)
    cli.add_device(parser, help="where mlflow's model is trained: ")
    arguments = parser.parse_args(argv)
    if arguments.config is not None and any(
        given is not None for given in (arguments.study, arguments.trial, arguments.seed)
    ):
        parser.error("CONFIG is a config by itself; leave --study, --trial and --seed away")

    from pipeline.app.export import export

    return export(
        arguments.config,
        root=arguments.root,
        storage=arguments.storage,
        study=arguments.study,
        trial=arguments.trial,
        seed=arguments.seed,
        format=arguments.format,
        out=arguments.out,
        device=arguments.device,
    )


def _trial(text: str) -> int | str:
    return text if text in ("adam", "sgd") else cli.whole_number(0)(text)


def script() -> NoReturn:
    """Run the command line as a console script does, and exit."""
    cli.run(main)


if __name__ == "__main__":
    script()
